"""Engines come and go: fifty of them in one process leave neither memory, nor file descriptors, nor threads behind."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainwright.comm import start
from trainwright.engine.initialize import initialize
from trainwright.testing import run_ranks

ENGINES = 50
WARM = 10  # allocators and caches settle in the first few


def trim() -> None:
    """Let the allocator give free pages back, so that what is resident is what is in use."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def build(parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch": {"micro": 2},
        "optim": {"name": "adamw", "lr": 1e-3},
        "precision": "fp32",
        "parallel": parallel,
    }


def create_and_destroy(rank: int, world: int, parallel: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    ranks = start()
    seen = []
    for _ in range(ENGINES):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))  # 2 MiB
        engine = initialize(model=model, config=build(parallel), ranks=ranks).engine
        engine.backward(engine(torch.ones(2, 256)).sum())
        engine.step()
        engine.destroy()
        del engine, model
        gc.collect()
        trim()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        seen.append((resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count(), tensors))
    return seen


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"zero": 2}),
        pytest.param(2, {"zero": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"zero": 3}, marks=pytest.mark.slow),
    ],
)
def test_fifty_engines_leave_nothing_behind(world: int, parallel: dict[str, Any]) -> None:
    for seen in run_ranks(create_and_destroy, world, parallel, timeout=200):
        memory, descriptors, threads, tensors = zip(*seen[WARM:], strict=True)
        # One may close late (a peer's connection at start-up does); one opened per engine would be 40 more.
        assert max(descriptors[-10:]) <= max(descriptors[:10]), f"file descriptors: {descriptors}"
        assert threads[-1] <= threads[0], "threads"
        assert tensors[-1] == tensors[0], "tensors that Python still knows"
        # One engine's parameters, gradients and state are 8 MiB: a leak would be 40 times that.
        assert max(memory[-10:]) - max(memory[:10]) < 8 << 20, [m >> 20 for m in memory]
