"""Messages as chat templates expect them, and every text that stands in one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainwright.base.errors import DataError

__all__ = ["plain_messages", "strings_in"]


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
        result["tool_calls"] = [_plain_call(call, number) for call in result["tool_calls"]]
    else:
        result.pop("tool_calls", None)
    return result


def _plain_call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"message {number + 1} has the tool call {call!r:.80}; expected a function with 'name' and 'arguments'",
            hint='write {"type": "function", "function": {"name": "...", "arguments": {...}}}',
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what is no JSON is written as it is
            arguments = json.loads(arguments)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


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
