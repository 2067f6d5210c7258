"""From validation errors to lines that a person can act on, all at once: `file:line  key.path: seen X, expected Y`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from trainwright.base.errors import ConfigError
from trainwright.base.text import align_columns
from trainwright.config.section import tag_of

__all__ = ["Problem", "config_error", "dotted", "from_validation", "show"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it was written ("recipe.yaml:4", "override optim.lr=x"), which key, and what."""

    where: str
    key: str
    message: str


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in path)


def show(value: Any) -> str:
    """A value as the recipe would write it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"the keys {', '.join(map(str, value))}" if value else "an empty section"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_validation(
    error: ValidationError, where: Callable[[Path], str], elsewhere: Callable[[str], str | None]
) -> list[Problem]:
    """The problems behind a pydantic error.

    Args:
        where: a key path -> the place where it, or the nearest section above it, was written.
        elsewhere: a key's name -> its full path in another section, if it stands in exactly one.
    """
    problems = []
    for details in error.errors():
        path = tuple(part for part in details["loc"] if not tag_of(part))
        context = details.get("ctx", {})
        expected, hint = context.get("expected", details["msg"]), context.get("hint", "")
        if details["type"] == "unknown_key":
            better = elsewhere(str(path[-1])) if not hint and expected.startswith("one of the keys") else None
            hint = f" Did you mean {better!r}?" if better else hint
            if expected.startswith("one of"):
                message = f"unknown key.{hint}" if hint else f"unknown key; expected {expected}."
            else:
                message = f"{expected}."
        elif details["type"] == "missing":
            message = f"missing; expected {expected}.{hint}"
        elif expected.startswith("no such key here"):
            message = f"{expected}.{hint}"
        else:
            message = f"seen {show(details['input'])}, expected {expected}.{hint}"
        problems.append(Problem(where(path), dotted(path), message))
    return problems


def config_error(source: str, problems: Sequence[Problem], hint: str | None = None) -> ConfigError:
    """One ConfigError that lists every problem once, in the order given."""
    unique = list(dict.fromkeys(problems))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    lines = align_columns([(p.where, f"{p.key}: {p.message}" if p.key else p.message) for p in unique])
    return ConfigError("\n".join([f"{count} in {source}", *(f"  {line}" for line in lines)]), hint=hint)
