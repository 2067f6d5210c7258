"""The language in which the tables of DeepSpeed's keys are written: what a key accepts, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trainwright.config.fields import Listed, Name, Real, Truth, Written

__all__ = [
    "ANY",
    "BOOL",
    "COUNT",
    "NUMBER",
    "POSITIVE",
    "TEXT",
    "TEXTS",
    "WHOLE",
    "Anything",
    "Block",
    "Choice",
    "Entry",
    "Leaf",
    "Maps",
    "NoEffect",
    "NotBuilt",
    "Variants",
    "WholeNumber",
    "entries",
    "off_block",
]


@dataclass(frozen=True)
class WholeNumber(Written):
    """A whole number from `minimum` to `maximum`; 5e8, which JSON reads as a fraction, is one."""

    minimum: int | None = 0
    maximum: int = 2**63 - 1

    @property
    def what(self) -> str:
        low = "" if self.minimum is None else f" >= {self.minimum}"
        return f"a whole number{low}" + (f" and <= {self.maximum}" if self.maximum < 2**63 - 1 else "")

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        if value != int(value) or value > self.maximum or (self.minimum is not None and value < self.minimum):
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Anything(Written):
    """Any value: for keys of features that are refused as a whole."""

    @property
    def what(self) -> str:
        return "any value"

    def read(self, value: Any) -> Any:
        return value


BOOL = Truth()
WHOLE = WholeNumber(minimum=None)
COUNT = WholeNumber(minimum=0)
POSITIVE = WholeNumber(minimum=1)
NUMBER = Real()
TEXT = Name(what_it_is="text")
TEXTS = Listed((), Name(what_it_is="text"), empty=True)
ANY = Anything()


@dataclass(frozen=True)
class Maps:
    """A key that becomes `to` in Trainwright's own configuration.

    Attributes:
        default: DeepSpeed's default, which the import takes where the key is not given.
        about: more for the page of all keys, such as how the value changes.
    """

    to: str
    accepts: Written
    default: Any = None
    about: str = ""


@dataclass(frozen=True)
class NoEffect:
    """A key that changes nothing here, whatever its value, and why."""

    reason: str
    accepts: Written
    default: Any = None


@dataclass(frozen=True)
class NotBuilt:
    """A key that asks for something Trainwright does not have: refused, unless its value is one of `off`.

    Attributes:
        off: values that ask for nothing; the first is DeepSpeed's default.
        instead: what to do.
    """

    feature: str
    accepts: Written
    off: tuple[Any, ...] = (False,)
    instead: str = ""

    @property
    def default(self) -> Any:
        return self.off[0] if self.off else None


@dataclass(frozen=True)
class Block:
    """A section of keys.

    Attributes:
        keys: its keys.
        switch: the key that turns the section on; "" when its presence does.
        feature: what the section is, when Trainwright does not have it: turned on, it is refused.
        named: keys are names that the user chooses, each with `keys` below it.
    """

    keys: Mapping[str, Entry]
    switch: str = ""
    feature: str = ""
    instead: str = ""
    named: bool = False


@dataclass(frozen=True)
class Choice:
    """One value of a `type` key: the keys of its `params`, or the feature that is not built."""

    keys: Mapping[str, Entry]
    feature: str = ""
    instead: str = ""


@dataclass(frozen=True)
class Variants:
    """A section whose `type` decides which keys its `params` have.

    Attributes:
        to: what `type` becomes.
        choices: the types, as DeepSpeed writes them; upper and lower case do not matter.
        keys: keys beside `type` and `params`.
    """

    to: str
    choices: Mapping[str, Choice]
    keys: Mapping[str, Entry] = field(default_factory=dict)


Leaf: TypeAlias = Maps | NoEffect | NotBuilt
Entry: TypeAlias = Maps | NoEffect | NotBuilt | Block | Variants


def off_block(feature: str, *keys: str, instead: str = "", inside: Mapping[str, Entry] | None = None) -> Block:
    """A section that is refused when its switch is on: only the names of its keys matter."""
    names: dict[str, Entry] = {key: NoEffect("", ANY) for key in keys}
    return Block({"enabled": NoEffect("", BOOL, False), **names, **(inside or {})}, "enabled", feature, instead)


def entries(keys: Mapping[str, Entry], path: str = "") -> Iterator[tuple[str, Leaf, Block | None]]:
    """(path, entry, the section it is in) of every key that is no section; `<name>` stands for names of the user."""
    yield from _entries(keys, path, None)


def _entries(keys: Mapping[str, Entry], path: str, inside: Block | None) -> Iterator[tuple[str, Leaf, Block | None]]:
    for key, entry in keys.items():
        here = f"{path}{key}"
        if isinstance(entry, Block):
            outer = entry if entry.feature or inside is None or not inside.feature else inside
            yield from _entries(entry.keys, f"{here}.<name>." if entry.named else f"{here}.", outer)
        elif isinstance(entry, Variants):
            yield from _entries(entry.keys, f"{here}.", inside)
        else:
            yield here, entry, inside
