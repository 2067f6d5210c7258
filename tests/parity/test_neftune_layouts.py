"""Training with NEFTune's noise does not depend on the layout: each against one process, losses and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import layout_runs
import pytest
from layout_runs import Run, Setting, differences, train

from trainwright.comm import ALONE, Ranks, start
from trainwright.comm.mesh import Layout, PipelineLayout
from trainwright.engine import Engine
from trainwright.models.embedding_noise import attach_embedding_noise
from trainwright.testing import run_ranks

ALPHA = 20.0

LAYOUTS = {
    "rows": Layout(2, 0, 1),
    "zero-3": Layout(2, 3, 2, gather="micro_batch"),
    "tensor": Layout(2, 0, 1, tensor=2),
    "context": Layout(2, 0, 1, context=2),
    "pipeline": Layout(2, 0, 1, pipeline=PipelineLayout(2)),
}


@contextlib.contextmanager
def noise() -> Iterator[None]:
    """Inside, models are divided with noise behind their embedding, and it sees every step, as the trainer does it."""
    divide, forward_backward = layout_runs.divide, Engine.forward_backward

    def noisy(model: Any, mesh: Any, *arguments: Any, **options: Any) -> Any:
        divided = divide(model, mesh, *arguments, **options)
        attach_embedding_noise(model, ALPHA)
        return divided

    def seen(self: Engine, loss: Any, batch: Any, **options: Any) -> None:
        self.model.embedding_noise.see(batch, self.data_parallel.mesh.rows[0])
        forward_backward(self, loss, batch, **options)

    layout_runs.divide, Engine.forward_backward = noisy, seen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        layout_runs.divide, Engine.forward_backward = divide, forward_backward  # type: ignore[method-assign]


def noisy_train(setting: Setting, layout: Layout, ranks: Ranks = ALONE) -> Run:
    with noise():
        return train(setting, layout, ranks)


def run_layouts(rank: int, world: int) -> list[list[Any]]:
    ranks = start()
    found: list[list[Any]] = []
    for family in ("llama", "gpt2"):
        setting = Setting(family, documents=True)
        reference = noisy_train(setting, Layout(1, 0, 1))
        for name, layout in LAYOUTS.items():
            found.append([family, name, differences(noisy_train(setting, layout, ranks), reference)])
    return found


@pytest.mark.slow
def test_every_layout_adds_the_same_noise() -> None:
    for family, name, apart in run_ranks(run_layouts, 2, timeout=300)[0]:
        assert max(apart.values()) < 1e-5, (family, name, apart)


def test_the_noise_changes_training() -> None:
    setting = Setting("llama", steps=1)
    with_noise, without = noisy_train(setting, Layout(1, 0, 1)), train(setting, Layout(1, 0, 1))
    assert abs(with_noise.losses[0] / without.losses[0] - 1) > 1e-4
