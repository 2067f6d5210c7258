"""JSON as people write it: comments and trailing commas are read, a key that stands twice is refused, Hjson as well."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from typing import Any

from trainwright.base.errors import ConfigError, MissingDependencyError

__all__ = ["decode_base64", "read_json"]

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*[}}\]])")


def read_json(text: str, name: str) -> Any:
    """The value of a JSON text, which may have comments and trailing commas, or be Hjson.

    Args:
        name: what messages call the text.

    Raises:
        ConfigError: the text is neither, or a key stands twice in one section.
        MissingDependencyError: the text is not JSON, and the package hjson is not there to try it as Hjson.
    """
    repeated: list[str] = []

    def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                repeated.append(key)
            seen[key] = value
        return seen

    try:
        value = _parse(text, name, section)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if repeated:
        keys = ", ".join(dict.fromkeys(repeated))
        raise ConfigError(f"{name}: seen twice in one section: {keys}", hint="keep one of each")
    return value


def _parse(text: str, name: str, section: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=section, parse_constant=_refuse)
    except json.JSONDecodeError:
        pass
    try:
        return json.loads(_without_comments(text), object_pairs_hook=section, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        return _parse_hjson(text, name, section, f"{name}:{error.lineno} is not JSON: {error.msg}")


def _refuse(constant: str) -> Any:
    raise ConfigError(f"seen {constant}, which is not JSON", hint="write a number")


def _without_comments(text: str) -> str:
    """Comments and trailing commas as spaces, so that the lines of errors stay right."""

    def blank(found: re.Match[str]) -> str:
        return found[1] or re.sub(r"[^\n]", " ", found[0])

    return _TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text))


def _parse_hjson(text: str, name: str, section: Callable[..., dict[str, Any]], problem: str) -> Any:
    try:
        import hjson
    except ImportError:
        raise MissingDependencyError(
            f"{problem}, and reading it as Hjson needs the package hjson",
            hint="pip install 'trainwright[deepspeed]', or write it as JSON (comments are read)",
        ) from None
    try:
        return hjson.loads(text, object_pairs_hook=section)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{problem}; nor is it Hjson: {error}") from None


def decode_base64(text: str) -> str | None:
    """The text behind urlsafe base64 of a JSON section, or None when it is no such thing."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text):
        return None
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None
