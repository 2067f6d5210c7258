"""Reading single values of a Hugging Face `config.json`, each refused by name when it cannot be what we build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from trainwright.base.errors import ModelError

__all__ = ["integer", "number", "refuse_unsupported", "required", "token_ids", "token_ids_to_hf"]

_MISSING: Any = object()


def required(values: Mapping[str, Any], key: str) -> Any:
    """The value of `key`; ModelError when the configuration lacks it."""
    if values.get(key) is None:
        raise ModelError(f"config.json has no {key!r}", hint="is this a complete Hugging Face model folder?")
    return values[key]


@overload
def integer(values: Mapping[str, Any], key: str, *, default: int = ...) -> int: ...
@overload
def integer(values: Mapping[str, Any], key: str, *, default: None) -> int | None: ...
def integer(values: Mapping[str, Any], key: str, *, default: int | None = _MISSING) -> int | None:
    """An integer field; `default` where it is absent or null."""
    if values.get(key) is None and default is not _MISSING:
        return default
    value = required(values, key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: {key}={value!r}; expected an integer")
    return value


def number(values: Mapping[str, Any], key: str, *, default: float = _MISSING) -> float:
    """A number field; `default` where it is absent or null."""
    if values.get(key) is None and default is not _MISSING:
        return default
    value = required(values, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"config.json: {key}={value!r}; expected a number")
    return float(value)


def token_ids(values: Mapping[str, Any], key: str) -> int | tuple[int, ...] | None:
    """One token id, several (Llama 3 has three end tokens), or None."""
    value = values.get(key)
    if isinstance(value, list):
        if not all(isinstance(item, int) for item in value):
            raise ModelError(f"config.json: {key}={value!r}; expected token ids")
        return tuple(value)
    return integer(values, key, default=None)


def token_ids_to_hf(value: int | tuple[int, ...] | None) -> int | list[int] | None:
    """The JSON form of `token_ids`."""
    return list(value) if isinstance(value, tuple) else value


def refuse_unsupported(values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """ModelError naming the first key whose value is not among the supported ones. An absent key is fine."""
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise ModelError(
                f"config.json: {key}={values[key]!r} is not supported; expected {expected}",
                hint="this model needs a part that Trainwright does not have",
            )
