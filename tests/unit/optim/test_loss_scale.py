"""The loss scale: transitions written out by hand, the floor, and exact resume."""

from __future__ import annotations

import json

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.protocols import Stateful
from trainwright.optim.loss_scale import LossScaleOptions, LossScaler

# Outcomes of steps ("x" overflows, "." does not) and the scale after each, worked out by hand from DeepSpeed's
# description: window 3, initial scale 16.
TABLES = {
    "without tolerance every overflow halves": (
        {"hysteresis": 1},
        "x x . . . . . . x",
        [8, 4, 4, 4, 8, 8, 8, 16, 8],
    ),
    "the first overflow is forgiven, each later one halves": (
        {"hysteresis": 2},
        "x x x . .",
        [16, 8, 4, 4, 4],
    ),
    "good steps do not restore the tolerance": (
        {"hysteresis": 2},
        "x . x . x",
        [16, 16, 8, 8, 4],
    ),
    "growth restores the tolerance": (
        {"hysteresis": 2},
        "x . . . x x",
        [16, 16, 16, 32, 32, 16],
    ),
    "only overflows in a row count": (
        {"hysteresis": 2, "consecutive_hysteresis": True},
        "x . x . x x x",
        [16, 16, 16, 16, 16, 8, 4],
    ),
    "an undisturbed start grows after a window": (
        {"hysteresis": 2},
        ". . . . . .",
        [16, 16, 32, 32, 32, 64],
    ),
    "an overflow starts the window again": (
        {"hysteresis": 2},
        ". . x . . .",
        [16, 16, 16, 16, 16, 32],
    ),
    "not below the floor": (
        {"hysteresis": 1, "min_scale": 4},
        "x x x . . .",
        [8, 4, 4, 4, 4, 8],
    ),
    "another factor": (
        {"hysteresis": 1, "factor": 4.0},
        "x . . .",
        [4, 4, 4, 16],
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_transitions(case: str) -> None:
    changes, outcomes, expected = TABLES[case]
    scaler = LossScaler(LossScaleOptions(initial_scale=16, window=3, **changes))  # type: ignore[arg-type]
    events = [scaler.update(outcome == "x") for outcome in outcomes.split()]
    assert [event.after for event in events] == expected
    assert [event.before for event in events] == [16, *expected[:-1]]


def test_defaults_are_the_documented_ones() -> None:
    scaler = LossScaler()
    assert scaler.scale == 65536
    for _ in range(999):
        assert scaler.update(False).after == 65536
    assert scaler.update(False).after == 131072
    assert scaler.update(True).after == 131072
    assert scaler.update(True).after == 65536


def test_at_the_floor_it_advises_and_goes_on() -> None:
    scaler = LossScaler(LossScaleOptions(initial_scale=2, hysteresis=1, window=4))
    for _ in range(3):
        scaler.update(False)
    assert scaler.update(True).advice is None  # 2 -> 1 still helps
    event = scaler.update(True)
    assert (event.before, event.after) == (1, 1)
    assert event.advice is not None
    for part in ("smallest loss scale, 1", "2 of the last 5 steps", "40.0 % of all 5", "bf16", "learning rate"):
        assert part in event.advice
    assert "NaN" not in event.advice
    for _ in range(4):
        event = scaler.update(False)
    assert event.after == 2, "it recovers"
    for _ in range(120):
        event = scaler.update(True)
    assert event.advice is not None
    assert "NaN" in event.advice


def test_a_fixed_scale_stays_and_advises_at_once() -> None:
    scaler = LossScaler(LossScaleOptions(static=128))
    assert not scaler.is_dynamic
    event = scaler.update(True)
    assert (event.overflow, event.after) == (True, 128)
    assert event.advice is not None
    assert "loss_scale: dynamic" in event.advice
    assert scaler.update(False).advice is None
    for _ in range(3000):
        scaler.update(False)
    assert scaler.scale == 128


def test_growth_is_bounded() -> None:
    scaler = LossScaler(LossScaleOptions(window=1))
    for _ in range(500):
        scaler.update(False)
    assert scaler.scale == 2.0**100


@pytest.mark.parametrize("consecutive", [False, True])
def test_resume_is_exact(consecutive: bool) -> None:
    options = LossScaleOptions(initial_scale=64, window=3, consecutive_hysteresis=consecutive)
    outcomes = [step % 7 in (2, 3) or step % 5 == 0 for step in range(60)]
    undisturbed = LossScaler(options)
    expected = [undisturbed.update(outcome) for outcome in outcomes]
    first, second = LossScaler(options), LossScaler(options)
    seen = [first.update(outcome) for outcome in outcomes[:23]]
    assert isinstance(second, Stateful)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen += [second.update(outcome) for outcome in outcomes[23:]]
    assert seen == expected
    assert second.state_dict() == undisturbed.state_dict()


@pytest.mark.parametrize(
    "changes",
    [{"static": 0.0}, {"initial_scale": -1}, {"min_scale": 0}, {"min_scale": 1e9}, {"window": 0}, {"factor": 1.0}],
)
def test_impossible_options_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="loss scale option"):
        LossScaleOptions(**changes)  # type: ignore[arg-type]
