"""Messages as chat templates expect them, and every text that stands in one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainwright.base.errors import DataError

__all__ = ["plain_call", "plain_messages", "strings_in"]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as one text, the arguments of tool calls as objects.

    Raises DataError for a message without a role, or with content that is neither text nor a list of texts.
    """
    return [_plain_message(message, number) for number, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(
            f"message {number + 1} is {message!r:.80}; expected an object with 'role' and 'content'",
            hint='write {"role": "user", "content": "..."}',
        )
    result = dict(message)
    content = result.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        result["content"] = "".join(str(part["text"]) for part in content)
    elif content is None:
        result["content"] = ""
    elif not isinstance(content, str):
        raise DataError(
            f"message {number + 1} ({message['role']}) has content of type {type(content).__name__}; expected text",
            hint="images and sounds are not trained on; leave such records out",
        )
    if result.get("tool_calls"):
        calls = result["tool_calls"]
        listed = calls if isinstance(calls, (list, tuple)) else [calls]
        result["tool_calls"] = [_call(call, number) for call in listed]
    else:
        result.pop("tool_calls", None)
    return result


def _call(written: Any, number: int) -> dict[str, Any]:
    call = plain_call(written)
    if call is None:
        raise DataError(
            f"message {number + 1} has the tool call {written!r:.80}; expected a function with 'name' and 'arguments'",
            hint='write {"type": "function", "function": {"name": "...", "arguments": {...}}}',
        )
    return call


def plain_call(written: Any) -> dict[str, Any] | None:
    """A call of a tool in the one form that templates get: {"type": "function", "function": {"name", "arguments"}},
    with the id where it has one. None where no function is named.

    Args:
        written: in that form, or {name, arguments} alone; `parameters` is another name of arguments. Arguments that
            are JSON in a text become what it says; without any they are an empty object.
    """
    function = written.get("function", written) if isinstance(written, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        # what a model wrote need not be JSON; templates write text as it stands
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments},
    }
    return {"id": written["id"], **call} if isinstance(written.get("id"), str) else call


def strings_in(value: Any) -> Iterator[str]:
    """Every text of a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name)
            yield from strings_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from strings_in(one)
