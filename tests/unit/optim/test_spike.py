"""The spike guard: quiet on ordinary curves, decided on broken ones, the same after a resume."""

from __future__ import annotations

import json
import math
import random

import pytest

from trainwright.base.errors import ConfigError
from trainwright.optim import SpikeGuard, SpikeOptions
from trainwright.optim.spike import robust_sigmas


def ordinary(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """A falling, noisy loss and a noisy gradient norm."""
    draw = random.Random(seed)
    return [
        (2.0 + 6.0 * math.exp(-step / 100) + draw.gauss(0, 0.05), abs(draw.gauss(1.0, 0.15))) for step in range(steps)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_curve_raises_no_alarm(seed: int) -> None:
    guard = SpikeGuard(SpikeOptions(on_spike="skip"))
    assert {guard.decide(*values).verdict for values in ordinary(2000, seed)} == {"ok"}


@pytest.mark.parametrize(("loss", "norm", "named"), [(9.0, 1.0, "loss 9"), (2.0, 30.0, "gradient norm 30")])
def test_a_spike_is_named_and_does_not_enter_the_window(loss: float, norm: float, named: str) -> None:
    guard = SpikeGuard(SpikeOptions(on_spike="skip"))
    for values in ordinary(500):
        guard.decide(*values)
    before = guard.state_dict()["losses"]
    decision = guard.decide(loss, norm)
    assert decision.verdict == "skip"
    assert named in decision.reason
    assert "sigma above the median" in decision.reason
    assert guard.state_dict()["losses"] == before
    assert guard.decide(2.0, 1.0).verdict == "ok"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_steps_are_skipped_until_there_are_too_many(value: float) -> None:
    guard = SpikeGuard(SpikeOptions(max_skips=3))
    verdicts = [guard.decide(value, 1.0).verdict for _ in range(3)]
    assert verdicts == ["skip", "skip", "stop"]


def test_a_good_step_starts_the_count_again() -> None:
    guard = SpikeGuard(SpikeOptions(max_skips=2))
    assert [guard.decide(loss, 1.0).verdict for loss in (math.nan, 2.0, math.nan, 2.0)] == ["skip", "ok", "skip", "ok"]
    assert guard.skipped == 2


def test_stop_and_ignore() -> None:
    assert SpikeGuard(SpikeOptions(on_nonfinite="stop")).decide(1.0, math.nan).verdict == "stop"
    ignoring = SpikeGuard(SpikeOptions(on_nonfinite="ignore"))
    assert ignoring.decide(math.nan, 1.0).verdict == "ok"
    assert ignoring.state_dict()["losses"] == []


def test_spikes_are_not_judged_before_there_is_a_history() -> None:
    guard = SpikeGuard(SpikeOptions(on_spike="stop", min_history=32))
    assert {guard.decide(loss, 1.0).verdict for loss in (10.0, 3.0, 1.0, 100.0)} == {"ok"}


def test_a_flat_history_has_a_floor() -> None:
    assert robust_sigmas(2.02, [2.0] * 50) == pytest.approx(1.0)
    assert robust_sigmas(1.0, [2.0] * 50) < 0


def test_resumed_guard_decides_the_same() -> None:
    curve = [*ordinary(300), (9.0, 1.0), (2.0, 40.0), (2.0, 1.0)]
    whole = SpikeGuard(SpikeOptions(on_spike="skip"))
    expected = [whole.decide(*values) for values in curve]
    first = SpikeGuard(SpikeOptions(on_spike="skip"))
    decided = [first.decide(*values) for values in curve[:301]]
    second = SpikeGuard(SpikeOptions(on_spike="skip"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert decided + [second.decide(*values) for values in curve[301:]] == expected


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="on_spike is 'retry'"):
        SpikeOptions(on_spike="retry")
    with pytest.raises(ConfigError, match="min_history"):
        SpikeOptions(min_history=200, window=100)
