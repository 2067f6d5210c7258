"""The recommended interval is where the expected loss is smallest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.checkpoint import expected_overhead, recommended_interval


def exact_overhead(interval: float, cost: float, mttf: float) -> float:
    """Daly 2006, the complete model without restart time: wall time per second of work, failures exponential."""
    return mttf * math.expm1((interval + cost) / mttf) / interval - 1


@given(st.floats(1e-3, 100), st.floats(500, 1e6))
def test_it_minimises_the_exact_model(cost: float, mttf: float) -> None:
    best = recommended_interval(cost, mttf)
    least = exact_overhead(best, cost, mttf)
    for factor in (0.8, 0.9, 1.1, 1.25):
        assert least <= exact_overhead(best * factor, cost, mttf) + 1e-12


def test_known_values() -> None:
    assert recommended_interval(5, 24 * 3600) == pytest.approx(math.sqrt(2 * 5 * 86400), rel=0.01)  # Young
    assert recommended_interval(100, 50) == 50
    assert recommended_interval(0, 50) == 0
    overhead = expected_overhead(recommended_interval(1, 3 * 3600), 1, 3 * 3600)
    assert overhead == pytest.approx(math.sqrt(2 / (3 * 3600)), rel=0.02)


@pytest.mark.parametrize(("cost", "mttf"), [(-1, 10), (1, 0), (1, -5), (math.nan, 1), (1, math.nan)])
def test_impossible_values_are_refused(cost: float, mttf: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        recommended_interval(cost, mttf)
    with pytest.raises(ValueError, match="interval"):
        expected_overhead(0, 1, 1)
