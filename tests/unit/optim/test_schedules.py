"""Schedules: equal to transformers' and torch's where those exist; bounded, continuous, checked."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError
from trainwright.optim.schedules import SCHEDULES, build_schedule, warmup_multiplier

TOTAL, WARMUP = 100, 12


def values(multiplier: Callable[[int], float], steps: int) -> list[float]:
    return [multiplier(step) for step in range(steps)]


def reference(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch minds that the optimizer makes no step
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return seen


def hf(name: str, **arguments: Any) -> list[float]:
    transformers = pytest.importorskip("transformers")
    function = getattr(transformers.optimization, name)
    return reference(lambda o: function(o, num_warmup_steps=WARMUP, **arguments), TOTAL)


@pytest.mark.parametrize(
    ("name", "options", "function", "arguments"),
    [
        ("constant", {}, "get_constant_schedule_with_warmup", {}),
        ("linear", {}, "get_linear_schedule_with_warmup", {"num_training_steps": TOTAL}),
        ("cosine", {}, "get_cosine_schedule_with_warmup", {"num_training_steps": TOTAL}),
        (
            "cosine",
            {"min_ratio": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": TOTAL, "min_lr_rate": 0.1},
        ),
        (
            "cosine",
            {"restarts": 2},
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_training_steps": TOTAL, "num_cycles": 3},
        ),
        *(
            (
                "wsd",
                {"decay_steps": 30, "shape": shape},
                "get_wsd_schedule",
                {"num_stable_steps": TOTAL - WARMUP - 30, "num_decay_steps": 30, "decay_type": theirs},
            )
            for shape, theirs in (("linear", "linear"), ("sqrt", "1-sqrt"), ("cosine", "cosine"))
        ),
        ("inverse_sqrt", {}, "get_inverse_sqrt_schedule", {}),
        ("inverse_sqrt", {"timescale": 50}, "get_inverse_sqrt_schedule", {"timescale": 50}),
        (
            "polynomial",
            {"power": 2.0, "min_ratio": 0.01},
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": TOTAL, "power": 2.0, "lr_end": 0.01},
        ),
    ],
)
def test_equals_transformers(name: str, options: dict[str, Any], function: str, arguments: dict[str, Any]) -> None:
    mine = build_schedule(name, TOTAL, WARMUP, warmup_start=0.0, **options)
    assert values(mine, TOTAL) == pytest.approx(hf(function, **arguments), abs=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_one_cycle_equals_torch(shape: str) -> None:
    expected = reference(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=TOTAL, anneal_strategy="cos" if shape == "cosine" else "linear"
        ),
        TOTAL,
    )
    assert values(build_schedule("one_cycle", TOTAL, shape=shape), TOTAL) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclical_equals_torch(mode: str) -> None:
    expected = reference(
        lambda o: torch.optim.lr_scheduler.CyclicLR(
            o, base_lr=0.2, max_lr=1.0, step_size_up=6, step_size_down=10, mode=mode, gamma=0.98
        ),
        TOTAL,
    )
    mine = build_schedule("cyclical", TOTAL, cycle_steps=16, rise_share=6 / 16, min_ratio=0.2, mode=mode, gamma=0.98)
    assert values(mine, TOTAL) == pytest.approx(expected, abs=1e-9)


def test_linear_and_polynomial_equal_torch_without_warmup() -> None:
    linear = reference(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=TOTAL), TOTAL)
    assert values(build_schedule("linear", TOTAL, min_ratio=0.1), TOTAL) == pytest.approx(linear, abs=1e-9)
    polynomial = reference(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=TOTAL, power=3.0), TOTAL)
    assert values(build_schedule("polynomial", TOTAL, power=3.0), TOTAL) == pytest.approx(polynomial, abs=1e-9)


EXTRA: dict[str, dict[str, Any]] = {"cyclical": {"cycle_steps": 20}, "one_cycle_decay": {"start": 0.04}}


@given(
    name=st.sampled_from(sorted(set(SCHEDULES) - {"lr_range_test"})),  # which rises without end
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    step=st.integers(0, 1200),
)
def test_stays_within_0_and_1_at_any_step(name: str, total: int, warmup: int, step: int) -> None:
    value = build_schedule(name, total, min(warmup, total), **EXTRA.get(name, {}))(step)
    assert 0.0 <= value <= 1.0


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"warmup_decay"}))  # which has DeepSpeed's first update
def test_warmup_rises_evenly_and_never_wastes_an_update(name: str) -> None:
    ramp = values(
        build_schedule(name, 200, 20, **EXTRA.get(name, {}), **({"min_ratio": 0.5} if name == "cyclical" else {})), 20
    )
    assert ramp[0] > 0
    assert all(a < b for a, b in itertools.pairwise(ramp))


def test_warmup_default_starts_one_stride_above_zero() -> None:
    assert [warmup_multiplier(step, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert [warmup_multiplier(step, 4, 0.0) for step in range(5)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_wsd_decay_is_a_share_of_the_whole_run() -> None:
    schedule = build_schedule("wsd", 100, 10, decay=0.2, min_ratio=0.1)
    assert schedule(79) == 1.0
    assert schedule(80) == 1.0
    assert schedule(81) < 1.0
    assert schedule(100) == pytest.approx(0.1)
    assert schedule(10_000) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "polynomial", "one_cycle"])
def test_falls_to_min_ratio_and_stays(name: str) -> None:
    schedule = build_schedule(name, 50, 5, min_ratio=0.25)
    assert schedule(50) == schedule(10**9) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosin", {}, "did you mean cosine"),
        ("linear", {"minratio": 0.1}, "no option 'minratio'"),
        ("linear", {"warmup_steps": 11}, "11 warm-up steps in a run of 10"),
        ("linear", {"min_ratio": 1.5}, "min_ratio is 1.5"),
        ("wsd", {"shape": "cubic"}, "shape is 'cubic'"),
        ("wsd", {"decay_steps": 9, "warmup_steps": 2}, "do not fit in 10 steps"),
        ("cyclical", {}, "needs cycle_steps"),
        ("cyclical", {"cycle_steps": 0}, "cycle_steps is 0"),
        ("cyclical", {"cycle_steps": 2, "mode": "square"}, "mode is 'square'"),
        ("cosine", {"restarts": -1}, "restarts is -1"),
    ],
)
def test_impossible_schedules_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule(name, 10, **arguments)
    assert message in str(caught.value)


def test_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="total_steps is 0"):
        build_schedule("linear", 0)
