"""Durations and sizes as people write them: "100 steps", "2M tokens", "10 min", "4 GiB", "20M".

Every type parses with a clear ConfigError and prints a text that parses back to the same value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from trainwright.base.errors import ConfigError

__all__ = ["Bytes", "Count", "Duration", "DurationUnit"]

DurationUnit = Literal["steps", "tokens", "epochs", "seconds"]

_NUMBER = r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
_COUNT = re.compile(rf"\s*({_NUMBER})\s*([kKMGBT]?)\s*")
_BYTES = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]*)\s*")
_AMOUNT_OF = re.compile(rf"\s*({_NUMBER})\s*([kKMGBT]?)\s*([A-Za-z]+)\s*")
_CLOCK_PART = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]+)\s*")

_COUNT_SUFFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BYTE_SUFFIX = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    **{f"{letter}ib": 2 ** (10 * (i + 1)) for i, letter in enumerate("kmgtp")},
    **{f"{letter}b": 10 ** (3 * (i + 1)) for i, letter in enumerate("kmgtp")},
}
_THINGS: dict[str, DurationUnit] = {
    "step": "steps",
    "steps": "steps",
    "token": "tokens",
    "tokens": "tokens",
    "epoch": "epochs",
    "epochs": "epochs",
}
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}


class Count(int):
    """A whole number >= 0, written with a decimal suffix: "512", "20M", "1.5B". An int in every other respect.

    `str()` gives the short form only where it is exact; use `format(count, "d")` for plain digits.
    """

    @classmethod
    def parse(cls, value: object) -> Count:
        """Raises ConfigError unless `value` is a whole number or a text such as "20M"."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _cannot_read(value, cls.expected)
        if isinstance(value, str):
            found = _COUNT.fullmatch(value)
            if not found:
                raise _cannot_read(value, cls.expected)
            number = Decimal(found[1]) * _COUNT_SUFFIX[found[2]]
        elif not math.isfinite(value):
            raise _cannot_read(value, cls.expected)
        else:
            number = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
        return cls(_whole(number, value, cls.expected))

    expected = "a whole number such as 512, 20M or 1.5B"

    def __str__(self) -> str:
        for suffix in "TBMk":
            scaled = Decimal(int(self)) / _COUNT_SUFFIX[suffix]
            # Four digits after the point at most: "1.0003B" still reads; anything finer is clearer in digits.
            if scaled >= 1 and scaled == round(scaled, 4 if suffix in "TB" else 2):
                return f"{scaled.normalize():f}{suffix}"
        return format(int(self), "d")

    def __repr__(self) -> str:
        return f"Count({int(self)})"


class Bytes(int):
    """A size in bytes: "4 GiB" (powers of 1024), "500 MB" (powers of 1000), or a plain number of bytes."""

    @classmethod
    def parse(cls, value: object) -> Bytes:
        """Raises ConfigError unless `value` is a whole number of bytes or a text such as "4 GiB"."""
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise _cannot_read(value, cls.expected)
        if isinstance(value, int):
            number = Decimal(value)
        else:
            found = _BYTES.fullmatch(value)
            if not found or found[2].lower() not in _BYTE_SUFFIX:
                raise _cannot_read(value, cls.expected)
            number = Decimal(found[1]) * _BYTE_SUFFIX[found[2].lower()]
        return cls(_whole(number, value, cls.expected))

    expected = "a size such as 4 GiB, 500 MB or a number of bytes"

    def __str__(self) -> str:
        for suffix in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
            scaled = Decimal(int(self)) / _BYTE_SUFFIX[suffix.lower()]
            if 1 <= scaled < 1024 and scaled == round(scaled, 2):
                return f"{scaled.normalize():f} {suffix}"
        return f"{format(int(self), 'd')} B"

    def __repr__(self) -> str:
        return f"Bytes({int(self)})"


@dataclass(frozen=True)
class Duration:
    """How long, or how often: a number of steps, tokens, epochs or seconds. Steps and tokens are whole numbers."""

    value: float
    unit: DurationUnit

    def __post_init__(self) -> None:
        whole = self.unit in ("steps", "tokens")
        if not math.isfinite(self.value) or self.value <= 0 or (whole and self.value != int(self.value)):
            what = "a whole number" if whole else "a number"
            raise ConfigError(f"a duration of {self.value} {self.unit}", hint=f"{self.unit} need {what} above 0")
        if whole and not isinstance(self.value, int):
            object.__setattr__(self, "value", int(self.value))

    expected = 'a duration such as "100 steps", "2M tokens", "2 epochs", "10 min" or "1h30m"'

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Raises ConfigError unless `value` is a Duration or a text with a unit."""
        if isinstance(value, Duration):
            return value
        if not isinstance(value, str):
            raise _cannot_read(value, cls.expected)
        found = _AMOUNT_OF.fullmatch(value)
        if found and found[3].lower() in _THINGS:
            number = Decimal(found[1]) * _COUNT_SUFFIX[found[2]]
            try:
                return cls(_exact(number, value), _THINGS[found[3].lower()])
            except ConfigError as error:
                raise _cannot_read(value, f"{cls.expected}; {error.hint}") from None
        seconds = _parse_clock(value)
        if not seconds:
            raise _cannot_read(value, cls.expected)
        return cls(seconds, "seconds")

    def __str__(self) -> str:
        if self.unit == "seconds":
            return _format_clock(self.value)
        if self.unit == "epochs":
            return f"{_plain(self.value)} epoch{'' if self.value == 1 else 's'}"
        return f"{Count(int(self.value))} {self.unit[:-1] if self.value == 1 else self.unit}"


def _parse_clock(text: str) -> float | None:
    """Seconds in "10 min", "1h30m", "2 days"; None when it is not a time. Units must fall from large to small."""
    position, total, smallest = 0, Decimal(0), math.inf
    while position < len(text):
        found = _CLOCK_PART.match(text, position)
        # Single letters as they are: "10m" is ten minutes, but "2M" is a count that lacks its "tokens".
        unit = found[2].lower() if found and len(found[2]) > 1 else found and found[2]
        scale = _SECONDS.get(unit) if unit else None
        if not found or scale is None or scale >= smallest:
            return None
        total, smallest, position = total + Decimal(found[1]) * scale, scale, found.end()
    return _exact(total, text)


def _format_clock(seconds: float) -> str:
    if seconds != int(seconds) or seconds < 60:
        return f"{_plain(seconds)} s"
    whole = int(seconds)
    if whole < 3600 and whole % 60 == 0:
        return f"{whole // 60} min"
    if whole % 3600 == 0:
        return f"{whole // 3600} h"
    parts = ((whole // 3600, "h"), (whole % 3600 // 60, "m"), (whole % 60, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def _plain(value: float) -> str:
    """Digits that read back to exactly `value`, whole numbers without a point."""
    return format(int(value), "d") if value == int(value) else repr(float(value))


def _whole(number: Decimal, seen: object, expected: str) -> int:
    """`number` as an int, refused when it is negative, has a fraction, or would not fit 64 bits ("1e999")."""
    if not 0 <= number < 2**63 or number != number.to_integral_value():
        raise _cannot_read(seen, expected)
    return int(number)


def _exact(number: Decimal, seen: object) -> float:
    if number >= 2**63:
        raise _cannot_read(seen, "a duration below 2^63")
    return int(number) if number == number.to_integral_value() else float(number)


def _cannot_read(value: object, expected: str) -> ConfigError:
    return ConfigError(f"seen {value!r}, expected {expected}")
