"""How single recipe values are written, read and refused: one annotation per kind of value.

Each annotation knows what it accepts and says so in the same words in error messages, in the JSON schema and in
docs/recipes.md. Values are typed: `steps: "100"` is refused where a number is meant, `yes` is not `true`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from trainwright.base.errors import ConfigError
from trainwright.base.text import did_you_mean
from trainwright.base.units import Bytes, Count, Duration

__all__ = ["Auto", "Fraction", "Listed", "Name", "Pattern", "Real", "Truth", "Unit", "Whole", "Words", "Written"]

Auto: TypeAlias = Literal["auto"]

Word = str | bool | int | None


@dataclass(frozen=True)
class Written:
    """Annotation of one scalar field: the words it accepts beside its values, and the error when it is neither."""

    words: tuple[Word, ...] = ()

    @property
    def what(self) -> str:
        """The values in words ("a whole number >= 1"); "" when only words are accepted."""
        return ""

    def read(self, value: Any) -> Any:
        """The value in its own type, or ValueError."""
        raise ValueError

    def json(self) -> dict[str, Any]:
        """JSON schema of the values, without the words."""
        return {}

    @property
    def expected(self) -> str:
        """All that is accepted, in words: "auto, or a whole number >= 1"."""
        words = ", ".join("null" if word is None else str(word).lower() for word in self.words)
        if not self.what:
            return f"one of {words}" if len(self.words) > 1 else words
        return f"{words} or {self.what}" if words else self.what

    def validate(self, value: Any) -> Any:
        for word in self.words:
            if type(value) is type(word) and value == word:
                return value
        try:
            return self.read(value)
        except (ValueError, ConfigError):
            names = [word for word in self.words if isinstance(word, str)]
            hint = did_you_mean(value, names) if isinstance(value, str) else ""
            context = {"expected": self.expected, "hint": hint}
            raise PydanticCustomError("expected", "expected {expected}.{hint}", context) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(plain)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{"enum": list(self.words)}] if self.words else []
        if self.what:
            choices.append(self.json())
        return choices[0] if len(choices) == 1 else {"anyOf": choices}


def plain(value: Any) -> Any:
    """A field's value as YAML and JSON hold it: units become text, tuples lists, numbers and words stay."""
    if isinstance(value, Count):
        text = str(value)
        return int(value) if text.isdecimal() else text
    if isinstance(value, (Bytes, Duration)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Words(Written):
    """Only the given words."""


@dataclass(frozen=True)
class Truth(Written):
    """true or false."""

    @property
    def what(self) -> str:
        return "true or false" if not self.words else "true, false"

    @property
    def expected(self) -> str:
        return ", ".join(["null" if word is None else str(word) for word in self.words] + ["true or false"])

    def read(self, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Whole(Written):
    """A whole number from `minimum` on."""

    minimum: int = 0

    @property
    def what(self) -> str:
        return f"a whole number >= {self.minimum}"

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or not self.minimum <= value < 2**63:
            raise ValueError
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.minimum}


@dataclass(frozen=True)
class Real(Written):
    """A finite number with optional bounds: `minimum` and `maximum` included, `above` and `below` excluded."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    @property
    def what(self) -> str:
        bounds = (("above", self.above), (">=", self.minimum), ("below", self.below), ("<=", self.maximum))
        return " ".join(["a number", " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)])

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        low = (self.minimum is None or value >= self.minimum) and (self.above is None or value > self.above)
        high = (self.maximum is None or value <= self.maximum) and (self.below is None or value < self.below)
        if not (low and high):
            raise ValueError
        return float(value)

    def json(self) -> dict[str, Any]:
        names = {
            "minimum": self.minimum,
            "exclusiveMinimum": self.above,
            "maximum": self.maximum,
            "exclusiveMaximum": self.below,
        }
        return {"type": "number", **{name: bound for name, bound in names.items() if bound is not None}}


@dataclass(frozen=True)
class Unit(Written):
    """A Duration, Count or Bytes."""

    unit: type[Duration] | type[Count] | type[Bytes] = Duration
    minimum: int = 0
    only: str | None = None
    """The one unit of a Duration that is accepted here ("seconds"), or None for all."""

    @property
    def what(self) -> str:
        if self.only == "seconds":
            return 'a time such as "90 s", "10 min" or "1h30m"'
        if self.only == "steps":
            return 'a number of steps such as "100 steps"'
        return self.unit.expected + (f", at least {self.minimum}" if self.minimum > 1 else "")

    def read(self, value: Any) -> Any:
        if isinstance(value, (Count, Bytes)) and not isinstance(value, self.unit):
            raise ValueError
        found = self.unit.parse(value)
        if isinstance(found, Duration):
            if self.only is not None and found.unit != self.only:
                raise ValueError
        elif found < self.minimum:
            raise ValueError
        return found

    def json(self) -> dict[str, Any]:
        kinds = ["string"] if self.unit is Duration else ["string", "integer"]
        return {"type": kinds if len(kinds) > 1 else kinds[0], "description": self.what}


@dataclass(frozen=True)
class Fraction(Written):
    """A Duration, or a fraction of the whole run."""

    @property
    def what(self) -> str:
        return 'a fraction of the run from 0 to 1, or a duration such as "100 steps" or "2M tokens"'

    def read(self, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Real(minimum=0, maximum=1).read(value)
        return Duration.parse(value)

    def json(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string"}]}


@dataclass(frozen=True)
class Name(Written):
    """Text of at least one character; `what_it_is` names it in messages ("a folder"), `pattern` restricts it."""

    what_it_is: str = "text"
    pattern: str | None = None

    @property
    def what(self) -> str:
        return self.what_it_is

    def read(self, value: Any) -> Any:
        if not isinstance(value, str) or not value.strip() or (self.pattern and not re.fullmatch(self.pattern, value)):
            raise ValueError
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, **({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})}


@dataclass(frozen=True)
class Pattern(Written):
    """A regular expression."""

    @property
    def what(self) -> str:
        return "a regular expression"

    def read(self, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            raise ValueError
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError from error
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "string", "format": "regex"}


@dataclass(frozen=True)
class Listed(Written):
    """A list of values of one kind, kept as a tuple."""

    item: Written = Written()
    length: int | None = None
    empty: bool = False
    """Whether a list without values is accepted."""

    @property
    def what(self) -> str:
        number = f"{self.length} values" if self.length else "values" if self.empty else "at least one value"
        return f"a list of {number}, each {self.item.expected}"

    def read(self, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or (self.length and len(value) != self.length):
            raise ValueError
        if not value and not self.empty:
            raise ValueError
        try:
            return tuple(self.item.validate(item) for item in value)
        except PydanticCustomError as error:
            raise ValueError from error

    def json(self) -> dict[str, Any]:
        length = (
            {"minItems": self.length, "maxItems": self.length} if self.length else {"minItems": 0 if self.empty else 1}
        )
        return {"type": "array", "items": self.item.__get_pydantic_json_schema__(None, None), **length}  # type: ignore[arg-type]
