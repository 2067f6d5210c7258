"""Golden numbers: equal within the tolerance or named; never recorded by accident."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainwright.testing.golden import UPDATE_VARIABLE, compare_to_golden, largest_difference


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "golden" / "losses.json"
    monkeypatch.setenv(UPDATE_VARIABLE, "1")
    compare_to_golden(path, {"loss": [2.0, 1.0, 0.5]}, rtol=0)
    monkeypatch.delenv(UPDATE_VARIABLE)
    return path


def test_equal_numbers_pass_within_the_tolerance(golden: Path) -> None:
    compare_to_golden(golden, {"loss": [2.0, 1.0, 0.5]}, rtol=0)
    compare_to_golden(golden, {"loss": [2.0019, 1.0, 0.5]}, rtol=1e-3)
    compare_to_golden(golden, {"loss": [2.0, 1.0, 0.6]}, rtol=0, atol=0.11)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": [2.0, 1.2, 0.51]}, r"loss\[1\] is 1.2, expected 1.0"),
        ({"loss": [2.0, 1.0]}, "loss has 2 numbers, expected 3"),
        ({"loss": [2.0, math.nan, 0.5]}, r"loss\[1\] is nan"),
        ({"los": [2.0, 1.0, 0.5]}, r"series \['los'\], expected \['loss'\]"),
    ],
)
def test_other_numbers_are_named(golden: Path, values: dict[str, list[float]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        compare_to_golden(golden, values, rtol=1e-3)


def test_a_missing_file_is_not_recorded_silently(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="record it with TRAINWRIGHT_UPDATE_GOLDEN=1"):
        compare_to_golden(tmp_path / "none.json", {"loss": [1.0]}, rtol=0)
    assert list(tmp_path.iterdir()) == []


def test_the_worst_difference_is_in_units_of_its_tolerance() -> None:
    excess, where = largest_difference({"a": [1.1, 10.0]}, {"a": [1.0, 10.5]}, rtol=0.1)
    assert excess == pytest.approx(1.0)
    assert where.startswith("a[0]")
