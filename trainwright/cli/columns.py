"""The columns of a file as options of a command, and errors about files in the words of these options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from trainwright.base.errors import ConfigError, DataError

__all__ = ["ColumnOption", "columns_of", "told_by_options"]

ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", help="KEY=COLUMN: what a column of the data is, as data.columns; may be given again."),
]

_SKIPPING = re.compile(r",? or set data\.on_error: skip[^,;]*")
_SETTING = re.compile(r"(\b(?:write|set) )?\bdata\.(\w+): (\{[^{}]*\}|\[[^][]*\]|[\w-]+)")


def columns_of(given: Sequence[str] | None) -> dict[str, str]:
    """`--column KEY=COLUMN ...` as a mapping. Raises ConfigError for anything else."""
    pairs = [item.partition("=") for item in given or ()]
    if wrong := [item for item, (key, _, value) in zip(given or (), pairs, strict=True) if not (key and value)]:
        raise ConfigError(f"--column {wrong[0]!r}: expected KEY=COLUMN", hint="for example --column text=review")
    return {key: value for key, _, value in pairs}


@contextmanager
def told_by_options(options: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name the options of a command in place of keys of a recipe, and advise nothing that it cannot do.

    Args:
        options: key of the section `data` to the option that is the same: {"columns": "--column"}.
    """

    def option(match: re.Match[str]) -> str:
        verb, key, value = match.groups()
        if key not in options:
            return match.group()
        values = [value]
        if value.startswith("{"):
            values = [item.replace(": ", "=", 1) for item in value[1:-1].split(", ")]
        elif value.startswith("["):
            values = [value[1:-1].replace(", ", ",")]
        return ("give " if verb else "") + " ".join(f"{options[key]} {one}" for one in values)

    try:
        yield
    except (ConfigError, DataError) as error:
        hint = error.hint or ""
        if "on_error" not in options:
            hint = _SKIPPING.sub("", hint)
        message = error.message.replace("data.columns names", f"{options['columns']} names")
        raise type(error)(message, hint=_SETTING.sub(option, hint) or None) from error
