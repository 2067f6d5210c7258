"""Updates in the backward pass, under layouts that divide parameters twice: the steps of one process."""

from __future__ import annotations

import pytest
from layout_runs import FAMILIES, MICRO, ROWS, Run, batches, differences

from trainwright.base.errors import ConfigError
from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, PipelineLayout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.config.precision_section import FP32Precision
from trainwright.engine import Engine, precision
from trainwright.engine.assemble import release_gradients
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import build_model
from trainwright.models.initialise import initial_values
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks

ONE = Layout(1, zero=0, shard=1)
LAYOUTS = (
    ("llama", Layout(4, zero=3, shard=2, tensor=2)),
    ("llama", Layout(4, zero=3, shard=2, context=2)),
    ("moe", Layout(4, zero=3, shard=4, expert=2)),
    ("moe", Layout(4, zero=1, shard=2, tensor=2, expert=2)),
)
MEMORY = MemorySection(release_gradients=True)


def train(family: str, layout: Layout, ranks: Ranks) -> Run:
    config = FAMILIES[family]()
    mesh, policy = make_mesh(layout, ranks), precision("fp32")
    model = build_model(config, device="meta")
    sections = Sections(FP32Precision(name="fp32"), ParallelSection(), CommSection(), MEMORY)
    divided = divide(model, mesh, policy, sections)
    materialise(model, ranks.device, initial_values(config, 3))
    optimizer = build_optimizer(optimized_parameters(model), OptimizerOptions(lr=3e-3, eps=1e-3))
    place, places = mesh.rows
    micro_batches = min(MICRO, ROWS // places)
    engine = Engine(
        model,
        optimizer,
        multiplier=lambda step: 1.0,
        precision=policy,
        data_parallel=divided.data_parallel,
        accumulation=micro_batches,
        schedule=divided.schedule,
        cut=divided.cut,
        stepping=release_gradients(optimizer, MEMORY, layout, clip_norm=None, scales_loss=False),
    )
    losses, norms = [], []
    for step, batch in enumerate(batches(config.vocab_size, 3, documents=False)):
        own = {key: value.chunk(places)[place] for key, value in batch.items()}
        engine.forward_backward(CausalLM().loss, own, micro_rows=ROWS // places // micro_batches, seed=step)
        assert all(p.grad is None for p in model.parameters()), "gradients are still there after the backward pass"
        report = engine.step()
        assert report is not None
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
    return Run(engine, losses, norms, {})


def on_ranks(rank: int, world: int) -> list[dict[str, float]]:
    from trainwright.comm import start

    ranks = start(device="cpu")
    alone = {family: train(family, ONE, ALONE) for family in ("llama", "moe")}
    return [differences(train(family, layout, ranks), alone[family]) for family, layout in LAYOUTS]


def test_the_steps_are_those_of_one_process() -> None:
    for of_rank in run_ranks(on_ranks, 4, timeout=240):
        for (family, layout), found in zip(LAYOUTS, of_rank, strict=True):
            assert max(found.values()) < 1e-5, f"{family} {layout.describe()}: {found}"


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (Layout(4, zero=1, shard=2, pipeline=PipelineLayout(stages=2)), "a pipeline runs several backward passes"),
        (Layout(4, zero=3, shard=2, expert=2), "gradients of experts are summed over the replicas"),
        (Layout(4, zero=0, shard=1, tensor=4), "tensor ranks without ZeRO sum the gradients"),
    ],
)
def test_layouts_that_sum_gradients_afterwards_are_refused(layout: Layout, why: str) -> None:
    optimizer = build_optimizer(build_model(FAMILIES["llama"]()).named_parameters(), OptimizerOptions())
    with pytest.raises(ConfigError, match=f"memory.release_gradients is true, but {why}"):
        release_gradients(optimizer, MEMORY, layout, clip_norm=None, scales_loss=False)
