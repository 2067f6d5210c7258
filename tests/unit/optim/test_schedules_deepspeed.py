"""DeepSpeed's schedules: its own numbers, its documented formulas derived anew, and what cannot be built."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.optim.schedules import build_schedule

# Recorded from DeepSpeed 0.19.8: the learning rate with which update 0, 1, 2, ... is made, its scheduler moved once
# after each, the optimizer's own learning rate 1.
RECORDED: list[tuple[str, int, int, dict[str, Any], list[float]]] = [
    (  # WarmupLR(min 0.1, max 1, 5 steps)
        "warmup_decay",
        100,
        5,
        {"warmup_start": 0.1},
        [0.1, 0.1, 0.487609, 0.714346, 0.875218, 1.0, 1.0, 1.0],
    ),
    (  # WarmupLR(max 1, 4 steps, linear)
        "warmup_decay",
        100,
        4,
        {"warmup_shape": "linear"},
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0],
    ),
    ("warmup_decay", 100, 1, {}, [0.0, 0.0, 1.0, 1.0]),  # WarmupLR(max 1, 1 step): it takes two
    (  # WarmupDecayLR(total 12, min 0.1, max 1, 5 steps)
        "warmup_decay",
        12,
        5,
        {"warmup_start": 0.1, "decay": "linear", "min_ratio": 0.1},
        [0.1, 0.1, 0.487609, 0.714346, 0.875218, 1.0, 1.0, 0.871429, 0.742857, 0.614286, 0.485714, 0.357143],
    ),
    (  # WarmupDecayLR(total 12, max 1, 4 steps, linear)
        "warmup_decay",
        12,
        4,
        {"warmup_shape": "linear", "decay": "linear"},
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0],
    ),
    (  # WarmupCosineLR(total 12, warmup_min_ratio 0.2, 5 steps, cos_min_ratio 0.1)
        "warmup_decay",
        12,
        5,
        {"warmup_start": 0.2, "decay": "cosine", "min_ratio": 0.1},
        [0.0, 0.2, 0.544541, 0.746085, 0.889082, 1.0, 0.955436, 0.83057, 0.650134, 0.449866, 0.26943, 0.144564, 0.1],
    ),
    (  # WarmupCosineLR(total 12, 4 steps, linear)
        "warmup_decay",
        12,
        4,
        {"warmup_shape": "linear", "decay": "cosine", "min_ratio": 1e-4},
        [
            0.0,
            0.0,
            0.25,
            0.5,
            0.75,
            0.961944,
            0.853568,
            0.691373,
            0.50005,
            0.308727,
            0.146532,
            0.038156,
            0.0001,
            0.0001,
        ],
    ),
    (  # OneCycle(min 0.1, max 1, 4 up, 6 down, decay rate 0.5 every 2)
        "one_cycle_decay",
        100,
        4,
        {"start": 0.1, "fall_steps": 6, "decay_steps": 2, "decay_rate": 0.5},
        [0.1, 0.325, 0.55, 0.775, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.08, 0.066667, 0.057143, 0.05],
    ),
    (  # OneCycle(min 0.2, max 1, 6 up in 3 stairs, 6 down in 2)
        "one_cycle_decay",
        100,
        6,
        {"start": 0.2, "rise_stairs": 3, "fall_stairs": 2},
        [0.2, 0.2, 0.466667, 0.466667, 0.733333, 0.733333, 1.0, 0.6, 0.6, 0.6, 0.2, 0.2, 0.2, 0.2],
    ),
    (  # LRRangeTest(min 1, size 4, rate 2)
        "lr_range_test",
        100,
        0,
        {"step_size": 4, "step_rate": 2.0},
        [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0],
    ),
    (
        "lr_range_test",
        100,
        0,
        {"step_size": 4, "step_rate": 2.0, "staircase": True},
        [1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 5.0],
    ),
]


@pytest.mark.parametrize(("name", "total", "warmup", "options", "expected"), RECORDED)
def test_equals_what_deepspeed_does(
    name: str, total: int, warmup: int, options: dict[str, Any], expected: list[float]
) -> None:
    schedule = build_schedule(name, total, warmup, **options)
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("warmup", [2, 7, 100])
@pytest.mark.parametrize("shape", ["log", "linear"])
@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_equals_the_documented_formulas(warmup: int, shape: str, decay: str) -> None:
    total, low, floor = 300, 0.15, 0.15 if decay == "linear" else 0.02
    schedule = build_schedule(
        "warmup_decay", total, warmup, warmup_start=low, warmup_shape=shape, decay=decay, min_ratio=floor
    )
    peak, lowest = 3e-4, 3e-4 * low
    for iteration in range(2 * total):  # update iteration + 1 sees the scheduler's iteration
        if iteration < warmup:
            share = math.log(iteration + 1, warmup) if shape == "log" else iteration / warmup
            expected = lowest + share * (peak - lowest)
        elif decay == "none":
            expected = peak
        elif decay == "linear":
            expected = lowest + (peak - lowest) * max(0.0, (total - iteration) / (total - warmup))
        else:
            angle = math.pi * min(1.0, (iteration - warmup + 1) / (total - warmup))
            expected = peak * (floor + (1 - floor) * (1 + math.cos(angle)) / 2)
        assert schedule(iteration + 1) * peak == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_the_cycle_is_one_and_symmetric_without_a_fall_of_its_own() -> None:
    schedule = build_schedule("one_cycle_decay", 50, 10, start=0.1)
    assert [schedule(10 - i) for i in range(11)] == pytest.approx([schedule(10 + i) for i in range(11)])
    assert max(schedule(step) for step in range(100)) == schedule(10) == 1.0
    assert schedule(20) == schedule(10_000) == pytest.approx(0.1)


def test_a_range_test_may_warm_up_first() -> None:
    schedule = build_schedule("lr_range_test", 100, 5, step_size=10)
    assert schedule(0) < schedule(4) < schedule(5) == 1.0
    assert schedule(25) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("warmup_decay", {"warmup_shape": "sqrt"}, "choose one of log, linear"),
        ("warmup_decay", {"decay": "exp"}, "choose one of none, linear, cosine"),
        ("warmup_decay", {"warmup_start": 2.0}, "warmup_start is 2.0"),
        ("one_cycle_decay", {"fall_steps": -1}, "fall_steps is -1"),
        ("one_cycle_decay", {"rise_stairs": -1}, "rise_stairs is -1"),
        ("one_cycle_decay", {"decay_steps": -2}, "decay_steps is -2"),
        ("one_cycle_decay", {"decay_rate": -0.5}, "decay_rate is -0.5"),
        ("lr_range_test", {"step_size": 0}, "step_size is 0"),
        ("lr_range_test", {"rate": 2}, "no option 'rate'"),
    ],
)
def test_impossible_ones_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule(name, 10, **options)
    assert message in str(caught.value)
