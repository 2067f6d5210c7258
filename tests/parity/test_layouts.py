"""Every layout computes the same training: losses, norms, gradients and parameters equal those of one process.

fp32, clipped, AdamW; relative differences below 1e-5 after 20 steps (3 in the quick suite). AdamW's eps is 1e-3, so
that gradients near zero do not turn rounding into steps of full size.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from layout_runs import Setting, differences, train

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm import start
from trainwright.comm.mesh import Layout, PipelineLayout
from trainwright.testing import run_ranks

TOLERANCE = 1e-5
FAMILIES = ("llama", "gpt2", "moe")


def two(**degrees: Any) -> Layout:
    return Layout(2, 0, 1, **degrees)


def four(zero: int = 0, shard: int = 1, **changes: Any) -> Layout:
    if zero == 3:
        changes = {"gather": "micro_batch", **changes}
    return Layout(4, zero, shard, **changes)


ALONE_AT_2 = {
    "tensor 2": two(tensor=2),
    "context 2, ring": two(context=2),
    "context 2, heads": two(context=2, ulysses=2),
    "pipeline 2": two(pipeline=PipelineLayout(2)),
    "pipeline 2, zero bubble": two(pipeline=PipelineLayout(2, "zbv", 2)),
    "expert 2": two(expert=2),
}

ALONE_AT_4 = {
    "tensor 4": four(tensor=4),
    "context 4, ring": four(context=4),
    "context 4, heads": four(context=4, ulysses=4),
    "context 4, heads x ring": four(context=4, ulysses=2),
    "pipeline 4": four(pipeline=PipelineLayout(4)),
    "expert 4": four(expert=4),
}

COMPOSED = {
    "tensor 2 x zero-1": four(1, 2, tensor=2),
    "tensor 2 x zero-2": four(2, 2, tensor=2, accumulate="sharded"),
    "tensor 2 x zero-3": four(3, 2, tensor=2),
    "pipeline 2 x zero-1": four(1, 2, pipeline=PipelineLayout(2)),
    "pipeline 2 x zero-2": four(2, 2, pipeline=PipelineLayout(2), accumulate="sharded"),
    "pipeline 2 x zero-3": four(3, 2, pipeline=PipelineLayout(2)),
    "pipeline 2 (interleaved) x zero-1": four(1, 2, pipeline=PipelineLayout(2, "interleaved", 2)),
    "pipeline 2 x replicas 2": four(pipeline=PipelineLayout(2)),
    "pipeline 2 x tensor 2": four(tensor=2, pipeline=PipelineLayout(2)),
    "pipeline 2 x context 2": four(context=2, pipeline=PipelineLayout(2)),
    "context 2 x zero-3": four(3, 2, context=2),
    "context 2 x zero-2 over both": four(2, 4, context=2),
    "context 2 x tensor 2": four(tensor=2, context=2),
    "expert 2 x zero-2": four(2, 4, expert=2),
    "expert 2 x hybrid zero-3": four(3, 2, expert=2),
    "expert 2 x tensor 2": four(tensor=2, expert=2),
    "expert 2 x context 2": four(context=2, expert=2),
    "pipeline 2 x expert 2": four(expert=2, pipeline=PipelineLayout(2)),
    "hybrid zero-2": four(2, 2),
}

IN_THE_QUICK_SUITE = ("tensor 2 x zero-3", "pipeline 2 x zero-2", "context 2 x tensor 2", "expert 2 x hybrid zero-3")

EIGHT = {
    "pipeline 2 x tensor 2 x zero-2": Layout(8, 2, 2, tensor=2, pipeline=PipelineLayout(2)),
    "pipeline 2 x tensor 2 x zero-3": Layout(8, 3, 2, gather="micro_batch", tensor=2, pipeline=PipelineLayout(2)),
    "tensor 2 x expert 2 x zero-1": Layout(8, 1, 4, tensor=2, expert=2),
    "pipeline 2 x context 2 x zero-3": Layout(8, 3, 4, gather="micro_batch", context=2, pipeline=PipelineLayout(2)),
}


def run_cells(rank: int, world: int, layouts: dict[str, Layout], settings: list[Setting]) -> list[list[Any]]:
    """[family, layout, differences by name] of every cell; those that the family cannot run are left out."""
    torch.set_num_threads(1)
    ranks = start()
    found: list[list[Any]] = []
    for setting in settings:
        reference = train(setting, Layout(1, 0, 1))
        for name, layout in layouts.items():
            if layout.expert > 1 and setting.family != "moe":
                continue
            run = train(setting, layout, ranks)
            found.append([setting.family, name, differences(run, reference)])
            run.engine.data_parallel.close()
    return found


def check(world: int, layouts: dict[str, Layout], settings: list[Setting], timeout: float = 120) -> None:
    apart = []
    for rank, cells in enumerate(run_ranks(run_cells, world, layouts, settings, timeout=timeout)):
        assert cells, "nothing was compared"
        for family, name, seen in cells:
            apart += [
                f"{family}, {name}, rank {rank}: {key} {value:.1e}" for key, value in seen.items() if value > TOLERANCE
            ]
    assert not apart, "\n".join(apart)


def test_each_axis_alone_on_two_ranks() -> None:
    check(2, ALONE_AT_2, [Setting("llama", documents=True), Setting("gpt2"), Setting("moe")])


def test_compositions_on_four_ranks() -> None:
    chosen = {name: COMPOSED[name] for name in IN_THE_QUICK_SUITE}
    check(4, chosen, [Setting("llama"), Setting("moe")])


@pytest.mark.slow
def test_twenty_steps_of_each_axis_on_two_ranks() -> None:
    check(2, ALONE_AT_2, [Setting(family, steps=20) for family in FAMILIES], timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_each_axis_and_composition_on_four_ranks(family: str) -> None:
    check(4, ALONE_AT_4 | COMPOSED, [Setting(family, steps=20)], timeout=900)


@pytest.mark.slow
def test_compositions_on_eight_ranks() -> None:
    check(8, EIGHT, [Setting("llama", steps=20), Setting("moe", steps=5)], timeout=600)


@pytest.mark.slow
def test_with_recomputing_compiled_blocks_and_packed_documents() -> None:
    layouts = {
        name: (ALONE_AT_4 | COMPOSED)[name]
        for name in ("tensor 2 x zero-3", "pipeline 2 x zero-3", "context 2 x tensor 2", "pipeline 2 x tensor 2")
    }
    memory = {"recompute": "full"}
    check(4, layouts, [Setting("llama", memory=memory, documents=True, compiled=True)], timeout=900)


# --- every cell of the table runs, or is refused with its reasons ---


def cells(world: int) -> list[dict[str, Any]]:
    """Every way of filling four ranks with degrees of 1, 2 and 4, at every stage."""
    found = []
    degrees = (1, 2, 4)
    for tensor, context, expert, stages, zero in itertools.product(degrees, degrees, degrees, degrees, range(4)):
        if tensor * stages > world:
            continue
        data = world // (tensor * stages)
        for shard in {1, 2, data} if zero else {1}:
            changes = {"gather": "micro_batch"} if zero == 3 else {}
            pipeline = PipelineLayout(stages)
            found.append(
                {"zero": zero, "shard": shard, "tensor": tensor, "context": context, "expert": expert,
                 "pipeline": pipeline, **changes}
            )  # fmt: skip
    return found


def run_or_refuse(rank: int, world: int, family: str) -> list[list[Any]]:
    torch.set_num_threads(1)
    ranks = start()
    setting = Setting(family, steps=1)
    reference = train(setting, Layout(1, 0, 1))
    found: list[list[Any]] = []
    for values in cells(world):
        name = ", ".join(f"{key} {value}" for key, value in values.items())
        try:
            run = train(setting, Layout(world, **values), ranks)
        except (ConfigError, ModelError) as error:
            found.append([name, "refused", error.message])
            continue
        found.append([name, "ran", max(differences(run, reference).values())])
        run.engine.data_parallel.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "moe"])
def test_every_cell_runs_or_is_refused(family: str) -> None:
    for seen in run_ranks(run_or_refuse, 4, family, timeout=900):
        ran = [(name, value) for name, what, value in seen if what == "ran"]
        refused = [(name, value) for name, what, value in seen if what == "refused"]
        assert len(ran) > (30 if family == "llama" else 60)
        assert all(value < TOLERANCE for _, value in ran), [cell for cell in ran if cell[1] >= TOLERANCE]
        assert all("parallel." in reason or "experts" in reason for _, reason in refused), refused
