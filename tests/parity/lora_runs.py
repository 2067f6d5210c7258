"""One small training run with adapters under any layout: what the parity tests of adapters compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layout_runs import FAMILIES, MICRO, PRECISIONS, ROWS, Run, batches, whole
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.comm import ALONE, Ranks
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.config import CommSection, MemorySection, ParallelSection
from trainwright.engine import Engine, precision
from trainwright.engine.divide import Sections, divide
from trainwright.engine.materialise import Values, materialise
from trainwright.engine.names import optimized_parameters
from trainwright.models import build_model
from trainwright.models.adapters import AdapterOptions, adapter_values, apply_adapter
from trainwright.models.initialise import initial_values
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.parallel.pipeline import parameter_names
from trainwright.tasks import CausalLM

__all__ = ["Adapted", "train"]


@dataclass(frozen=True)
class Adapted:
    """What of a run may vary beside its layout."""

    family: str
    options: AdapterOptions
    steps: int = 3
    precision: str = "fp32"
    memory: dict[str, Any] | None = None
    freeze_from: int | None = None


def train(setting: Adapted, layout: Layout, ranks: Ranks = ALONE) -> Run:
    """Build, adapt, divide and train; every rank of `ranks` calls it."""
    config = FAMILIES[setting.family]()
    mesh = make_mesh(layout, ranks)
    policy = precision(setting.precision)
    memory = MemorySection(**(setting.memory or {}))
    sections = Sections(PRECISIONS[setting.precision](name=setting.precision), ParallelSection(), CommSection(), memory)
    model = build_model(config, device="meta")
    report = apply_adapter(model, setting.options)
    divided = divide(model, mesh, policy, sections)
    values = adapter_values(report.linears, initial_values(config, 3), seed=4)
    materialise(model, ranks.device, _with_addition(values))
    optimizer = build_optimizer(
        optimized_parameters(model), OptimizerOptions(lr=3e-3, eps=1e-3), elsewhere=parameter_names(model)
    )
    place, places = mesh.rows
    micro_batches = min(MICRO, ROWS // places)
    engine = Engine(
        model,
        optimizer,
        multiplier=lambda step: 1.0,
        precision=policy,
        data_parallel=divided.data_parallel,
        accumulation=micro_batches,
        clip_norm=0.5,
        schedule=divided.schedule,
        cut=divided.cut,
    )
    task = CausalLM()
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches(config.vocab_size, setting.steps, documents=False)):
        own = {key: value[place::places] for key, value in batch.items()}
        engine.forward_backward(task.loss, own, micro_rows=ROWS // places // micro_batches, seed=step)
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        taken = engine.step()
        assert taken is not None
        losses.append(float(taken.loss))
        norms.append(float(taken.grad_norm))
    return Run(engine, losses, norms, gradients)


def _with_addition(values: Values) -> Values:
    """B that is not zero, so that every gradient and the length of every row matters from the first step on."""

    def value(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not name.endswith("lora_B"):
            return values(name, shape, dtype)
        generator = torch.Generator().manual_seed(derive_seed(9, name))
        return torch.randn(tuple(shape), generator=generator).mul(0.02).to(dtype)

    return value
