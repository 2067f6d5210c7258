"""Records become plain JSON values, strictly: whatever an emitter put in, a line can be written and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from trainwright.base.events import Record

__all__ = ["from_json_line", "plain_record", "to_json_line"]

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such numbers: they are written as these strings, which `float()` reads in Python, JavaScript and C."""


@runtime_checkable
class _Scalar(Protocol):
    """A zero-dimensional tensor or array."""

    def item(self) -> Any: ...


def plain_record(record: Record) -> Record:
    """A copy in which every value is None, bool, int, float, str, or a list or dict of them.

    Device scalars are read here, on the monitor's thread. An emitter that goes on changing a tensor hands out a copy.
    """
    return {str(key): _plain(value) for key, value in record.items()}


def to_json_line(record: Record) -> bytes:
    """One record as one line of strict JSON in UTF-8, with the newline; NaN and infinities as strings."""
    text = json.dumps(_finite(plain_record(record)), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    return text.encode("utf-8") + b"\n"


def from_json_line(line: bytes | str) -> Record:
    """The record of one line; "NaN", "Infinity" and "-Infinity" are numbers again. ValueError when it is no object."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a record is an object, this is {type(record).__name__}")
    return {key: _numbered(value) for key, value in record.items()}


def _numbered(value: Any) -> Any:
    """Non-finite numbers out of their words, in the record and in what it holds by name (metrics, baselines)."""
    if isinstance(value, dict):
        return {key: _numbered(entry) for key, entry in value.items()}
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # A file name that is not UTF-8 arrives with lone surrogates, which no UTF-8 file can hold.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, _Scalar):
        try:
            return _plain(value.item())
        except (ValueError, RuntimeError):  # more than one element: its text says so
            return str(value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
