"""Numbers a test produced once and must produce again: kept as JSON, compared with a stated tolerance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["UPDATE_VARIABLE", "compare_to_golden", "largest_difference"]

UPDATE_VARIABLE = "TRAINWRIGHT_UPDATE_GOLDEN"
"""Set to 1, tests write their golden files instead of comparing; the change then shows in review."""

Numbers = Mapping[str, Sequence[float]]


def compare_to_golden(path: Path, values: Numbers, *, rtol: float, atol: float = 0.0) -> None:
    """AssertionError, naming the worst number, unless `values` equal those in `path` within atol + rtol * |expected|.

    A missing file is an error too, not a silent first recording: set TRAINWRIGHT_UPDATE_GOLDEN=1 to record.
    """
    found = {name: [float(value) for value in series] for name, series in values.items()}
    if os.environ.get(UPDATE_VARIABLE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return
    if not path.exists():
        raise AssertionError(f"no golden file {path}; record it with {UPDATE_VARIABLE}=1 and look at it")
    expected = json.loads(path.read_text(encoding="utf-8"))
    if set(found) != set(expected):
        raise AssertionError(f"{path.name}: series {sorted(found)}, expected {sorted(expected)}")
    excess, where = largest_difference(found, expected, rtol=rtol, atol=atol)
    if not excess <= 1.0:
        raise AssertionError(f"{path.name}: {where}, {excess:.3g} times the tolerance (rtol {rtol}, atol {atol})")


def largest_difference(found: Numbers, expected: Numbers, *, rtol: float, atol: float = 0.0) -> tuple[float, str]:
    """The worst difference in units of its tolerance (infinite for NaN or another length), and where it is."""
    worst, where = 0.0, "equal"
    for name, series in expected.items():
        if len(found[name]) != len(series):
            return math.inf, f"{name} has {len(found[name])} numbers, expected {len(series)}"
        for i, (a, b) in enumerate(zip(found[name], series, strict=True)):
            if a == b:
                continue
            tolerance = atol + rtol * abs(b)
            excess = abs(a - b) / tolerance if tolerance else math.inf
            if math.isnan(excess):
                excess = math.inf
            if excess > worst:
                worst, where = excess, f"{name}[{i}] is {a!r}, expected {b!r}"
    return worst, where
