"""Divided experts beside what else an engine does: recomputing, compiling, accumulating in bf16, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
from layout_runs import Setting, differences, train

from trainwright.comm import start
from trainwright.comm.layout import Layout, PipelineLayout
from trainwright.testing import run_ranks

FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective"}

PAIRS: list[tuple[Setting, dict[str, Any]]] = [
    (Setting("moe", memory=FULL), {"zero": 0, "shard": 1, "expert": 2}),
    (Setting("moe", memory=FULL), {"zero": 3, "shard": 2, "expert": 2, "gather": "micro_batch"}),
    (Setting("moe", memory=SELECTIVE), {"zero": 2, "shard": 2, "expert": 2, "accumulate": "sharded"}),
    (Setting("moe", compiled=True), {"zero": 3, "shard": 2, "expert": 2, "gather": "micro_batch"}),
    (Setting("moe", compiled=True, memory=FULL, documents=True), {"zero": 1, "shard": 2, "expert": 2}),
    (Setting("moe", memory=FULL), {"zero": 0, "shard": 1, "tensor": 2}),
]

FOURS: list[tuple[Setting, dict[str, Any]]] = [
    (Setting("moe"), {"zero": 0, "shard": 1, "expert": 2, "pipeline": PipelineLayout(2)}),
    (Setting("moe", memory=FULL), {"zero": 3, "shard": 2, "expert": 2, "pipeline": PipelineLayout(2, "zbv", 2)}),
    (Setting("moe"), {"zero": 1, "shard": 2, "tensor": 2, "expert": 1}),
    (Setting("moe", memory=FULL, documents=True), {"zero": 3, "shard": 4, "expert": 4, "gather": "micro_batch"}),
]


def on_rank(rank: int, world: int, cases: list[tuple[Setting, dict[str, Any]]]) -> list[dict[str, float]]:
    found = []
    for setting, layout in cases:
        run = train(setting, Layout(world=world, **layout), start())
        # Compiled code rounds otherwise: what is compared is dividing, so both are compiled or neither is.
        found.append(differences(run, train(setting, Layout(1, 0, 1))))
    return found


def check(cases: list[tuple[Setting, dict[str, Any]]], world: int) -> None:
    for found in run_ranks(on_rank, world, cases, timeout=500):
        for case, worst in zip(cases, found, strict=True):
            assert max(worst.values()) < 1e-5, (case, worst)


@pytest.mark.slow
def test_two_ranks() -> None:
    check(PAIRS, world=2)


@pytest.mark.slow
def test_half_precision() -> None:
    """Rounding to bf16 turns a choice over here and there, so losses are near, not equal."""
    cases: list[tuple[Setting, dict[str, Any]]] = [
        (Setting("moe", precision="bf16"), {"zero": 3, "shard": 2, "expert": 2, "gather": "micro_batch"}),
        (Setting("moe", precision="bf16"), {"zero": 0, "shard": 1, "expert": 2}),
    ]
    for found in run_ranks(on_rank, 2, cases, timeout=200):
        for worst in found:
            assert worst["loss"] < 1e-3
            assert worst["norm"] < 2e-2


@pytest.mark.slow
def test_four_ranks() -> None:
    check(FOURS, world=4)
