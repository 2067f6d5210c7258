"""Frozen parts and learning rates by layer do not depend on the layout, also where a stage trains nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import layout_runs
import pytest
from layout_runs import Run, Setting, differences, train

from trainwright.comm import ALONE, Ranks, start
from trainwright.comm.mesh import Layout, PipelineLayout
from trainwright.parallel.pipeline import parameter_names
from trainwright.testing import run_ranks

LAYOUTS = {
    "rows": Layout(2, 0, 1),
    "zero-1": Layout(2, 1, 2),
    "zero-2": Layout(2, 2, 2),
    "zero-3": Layout(2, 3, 2, gather="micro_batch"),
    "tensor": Layout(2, 0, 1, tensor=2),
    "context": Layout(2, 0, 1, context=2),
    "pipeline": Layout(2, 0, 1, pipeline=PipelineLayout(2)),
}
FOUR = {
    "pipeline x zero-2": Layout(4, 2, 2, pipeline=PipelineLayout(2), accumulate="sharded"),
    "pipeline x zero-3": Layout(4, 3, 2, gather="micro_batch", pipeline=PipelineLayout(2)),
}
CHANGES: dict[str, dict[str, Any]] = {
    "by layer": {"layer_decay": 0.5},
    "frozen stage": {"freeze": ("embeddings", "layers.0-1")},
    "head alone": {"freeze": ("all_but_head",)},
}


@contextlib.contextmanager
def options(changes: dict[str, Any]) -> Iterator[None]:
    """Inside, optimizers are built with these options, and know the parameters of other stages."""
    build, optimized = layout_runs.build_optimizer, layout_runs.optimized_parameters
    models: list[Any] = []

    def noted(model: Any) -> Any:
        models.append(model)
        return optimized(model)

    def changed(named: Any, given: Any) -> Any:
        return build(named, replace(given, **changes), elsewhere=parameter_names(models[-1]))

    layout_runs.build_optimizer, layout_runs.optimized_parameters = changed, noted  # type: ignore[assignment]
    try:
        yield
    finally:
        layout_runs.build_optimizer, layout_runs.optimized_parameters = build, optimized


def changed_train(changes: dict[str, Any], layout: Layout, ranks: Ranks = ALONE) -> Run:
    with options(changes):
        return train(Setting("llama", steps=2), layout, ranks)


def run_layouts(rank: int, world: int, layouts: dict[str, Layout], names: list[str]) -> list[list[Any]]:
    ranks = start()
    found: list[list[Any]] = []
    for what in names:
        reference = changed_train(CHANGES[what], Layout(1, 0, 1))
        for name, layout in layouts.items():
            found.append([what, name, differences(changed_train(CHANGES[what], layout, ranks), reference)])
    return found


def check(world: int, layouts: dict[str, Layout], names: list[str]) -> None:
    for found in run_ranks(run_layouts, world, layouts, names, timeout=300):
        assert len(found) == len(layouts) * len(names)
        for what, name, apart in found:
            assert max(apart.values()) < 1e-5, (what, name, apart)


def test_a_head_alone_gets_its_gradient_where_state_is_divided() -> None:
    """All before it is frozen: nothing but the head has a gradient, which FSDP2 does not expect."""
    check(2, {"zero-3": LAYOUTS["zero-3"], "pipeline": LAYOUTS["pipeline"]}, ["head alone"])


@pytest.mark.slow
def test_every_layout_trains_the_same_parts_at_the_same_rates() -> None:
    check(2, LAYOUTS, list(CHANGES))


@pytest.mark.slow
def test_frozen_stages_of_ranks_that_divide_their_state() -> None:
    check(4, FOUR, ["frozen stage", "head alone"])
