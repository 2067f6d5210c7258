"""Which column of a row is meant: the names a person gave first, then the names that are recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.base.text import did_you_mean, nearest
from trainwright.data.documents import fields_seen
from trainwright.data.records.opened import Options
from trainwright.data.records.record import SHAPES, Shape, Unusable

__all__ = ["ABSENT", "Columns", "as_text", "check_columns", "check_unicode", "describe", "suggestion"]

ABSENT: Any = object()
"""What `Columns.find` gives for a column that the row does not have."""


def check_columns(columns: Mapping[str, Any], shape: Shape) -> None:
    """Raises ConfigError for a key that no format of the shape has."""
    for key in columns:
        if key not in shape.columns:
            raise ConfigError(
                f"data.columns names {key!r}, which {shape.what} ({shape.name}) has not; expected "
                f"{', '.join(shape.columns)}.{did_you_mean(str(key), shape.columns)}",
                hint=f"write data.columns: {{{next(iter(shape.columns))}: NAME}} with the name of a column of the file",
            )


class Columns:
    """Finds the columns of a shape in the rows of one file. Those of answers are absent where they are not read."""

    def __init__(self, shape: Shape, options: Options) -> None:
        self._shape = shape
        self._given = {key: str(name) for key, name in options.columns.items()}
        self._optional = options.optional
        self._unread = frozenset(() if options.answers else shape.answers)
        self._seen: dict[tuple[Any, ...], str | None] = {}

    def find(self, fields: Mapping[str, Any], key: str, aliases: Iterable[str] | None = None) -> Any:
        """The value of a column, or ABSENT. Raises Unusable where a column that a person named is not there."""
        if key in self._unread:
            return ABSENT
        given = self._given.get(key)
        value = ABSENT if given is None else _reach(fields, given)
        if given is not None and (key not in self._optional or value is not ABSENT):
            if value is ABSENT:
                raise Unusable(
                    "missing-field",
                    f"no column {given!r} (data.columns says that it is {key!r}); {fields_seen(given, fields)}",
                    suggestion(key, fields, given),
                )
            return value
        names = self._shape.columns[key] if aliases is None else tuple(aliases)
        signature = (names, *fields)
        if signature not in self._seen:
            self._seen[signature] = self._recognise(fields, names)
        name = self._seen[signature]
        return ABSENT if name is None else fields[name]

    def _recognise(self, fields: Mapping[str, Any], names: Iterable[str]) -> str | None:
        """The first of the names that is a column, in any case of letters, and not said to be another one."""
        free = [name for name in fields if name not in self._given.values()]
        by_case = {str(name).strip().lower(): name for name in reversed(free)}
        return next(
            (name if name in free else by_case[name] for name in names if name in free or name in by_case), None
        )

    def has(self, fields: Mapping[str, Any], *keys: str) -> bool:
        """Whether all of these columns are there."""
        return all(self._there(fields, key) for key in keys)

    def _there(self, fields: Mapping[str, Any], key: str) -> bool:
        try:
            return self.find(fields, key) is not ABSENT
        except Unusable:
            return False

    def need(self, fields: Mapping[str, Any], key: str, aliases: Iterable[str] | None = None) -> Any:
        """The value of a column that must be there."""
        value = self.find(fields, key, aliases)
        if value is ABSENT:
            names = tuple(aliases) if aliases is not None else self._shape.columns[key]
            raise Unusable(
                "missing-field",
                f"no column for {key!r}; {fields_seen(key, fields)}; expected one of {', '.join(names)}",
                suggestion(key, fields, *names),
            )
        return value

    def reads(self, key: str) -> bool:
        """Whether a column of this kind is looked at."""
        return key not in self._unread

    def text(self, fields: Mapping[str, Any], key: str) -> str:
        """A column that must be there and hold text."""
        return as_text(self.need(fields, key), key)

    def extras(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The record's own id, where it has one."""
        found = self.find(fields, "id")
        return {} if found is ABSENT or found is None or isinstance(found, (dict, list)) else {"id": str(found)}


def _reach(fields: Mapping[str, Any], name: str) -> Any:
    """A column, or by dots a value inside an object: `translation.de`."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def as_text(value: Any, column: str) -> str:
    """A string that UTF-8 can write. Raises Unusable; `column` may be a place inside one: `messages[0].content`."""
    if not isinstance(value, str):
        hint = f"name another column: data.columns: {{{column}: ...}}, or mend the data"
        what = f"column {column!r} is {describe(value)}; expected text"
        raise Unusable("not-a-string", what, hint if column.isidentifier() else None)
    check_unicode(value, f"column {column!r}")
    return value


def check_unicode(value: Any, what: str) -> None:
    """Raise Unusable where a value, or one inside it, is half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            message = f"{what} has a lone surrogate {code} at character {error.start}, which is not text"
            raise Unusable("invalid-unicode", message) from error
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(key, what)
            check_unicode(item, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_unicode(item, what)


def describe(value: Any) -> str:
    """`a list (['a', 'b'])`: what a value is, and its beginning."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    kind = names.get(type(value), "null" if value is None else type(value).__name__)
    return kind if value is None else f"{kind} ({value!r:.60})"


def suggestion(key: str, seen: Iterable[str], *wanted: str) -> str:
    """The line that would mend a missing column, with the column that is most likely meant."""
    names = [str(name) for name in seen if str(name) not in ("id", "idx")]
    known = {name for shape in SHAPES.values() for aliases in shape.columns.values() for name in aliases}
    close = next((found for word in (key, *wanted) if (found := nearest(word, names)) is not None), None)
    left = [name for name in names if name not in known]
    chosen = close or (left[0] if left else "the name of the column")
    return f"write data.columns: {{{key}: {chosen}}}"
