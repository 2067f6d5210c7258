"""The messages of a conversation in one style: OpenAI's, with the arguments of tool calls as objects."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from trainwright.base.text import nearest
from trainwright.data.chat_messages import plain_call
from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.record import Unusable

__all__ = ["json_list", "message", "messages_from", "tool_schemas"]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALLS = "function_call"  # ShareGPT's turn of an assistant that calls tools, and OpenAI's older field of one call
_KEPT = ("name", "tool_call_id", "reasoning_content", "weight")


def message(role: str, content: str) -> dict[str, Any]:
    """One message without tool calls."""
    return {"role": role, "content": content}


def json_list(value: Any) -> Any:
    """The list that a text holds as JSON, as tables have it; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def messages_from(chat: Any, column: str, columns: Columns) -> list[dict[str, Any]]:
    """Messages of (role, content) or (from, value) objects, which may be written as JSON in a text. Raises Unusable,
    naming the message from 0."""
    chat = json_list(chat)
    if not isinstance(chat, (list, tuple)):
        raise Unusable("bad-message", f"column {column!r} is {describe(chat)}; expected a list of messages")
    messages = []
    for position, item in enumerate(chat):
        place = f"{column}[{position}]"
        if not isinstance(item, Mapping):
            raise Unusable("bad-message", f"{place} is {describe(item)}; expected an object with role and content")
        role = columns.find(item, "role")
        if not isinstance(role, str) or not role:
            raise Unusable(
                "bad-message",
                f"{place} has {', '.join(map(str, item)) or 'nothing'}; expected role and content, or from and value",
                "write data.columns: {role: ..., content: ...}",
            )
        content = columns.find(item, "content")
        messages.append(_one(item, role, None if content is ABSENT else content, place))
    return messages


def _one(item: Mapping[str, Any], role: str, content: Any, place: str) -> dict[str, Any]:
    if role == _CALLS:
        calls = _calls(_parsed(content, place), place)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    role = _SYNONYMS.get(role, role)
    if role not in _ROLES:
        meant = nearest(role, (*_ROLES, *_SYNONYMS))
        # other roles are a matter of the template; one that is nearly a known one is a slip of the pen
        if meant is not None:
            raise Unusable("bad-message", f"{place} has the role {role!r}; did you mean {meant!r}?")
    kept = {name: item[name] for name in _KEPT if item.get(name) is not None}
    if "reasoning_content" in kept:
        as_text(kept["reasoning_content"], f"{place}.reasoning_content")
    if kept.get("weight", 1) not in (0, 1):
        raise Unusable("bad-message", f"{place}.weight is {describe(kept['weight'])}; expected 0 (not trained) or 1")
    written = item.get("tool_calls") or item.get(_CALLS)  # OpenAI's older name has one call
    if written:
        kept["tool_calls"] = _calls(written, place)
    return {"role": role, "content": _content(content, place, empty_allowed=bool(written)), **kept}


def _content(content: Any, place: str, *, empty_allowed: bool) -> str:
    if content is None and empty_allowed:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, place) for part in content)
    if content is None:
        raise Unusable("bad-message", f"{place} has no content")
    return as_text(content, f"{place}.content")


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return as_text(part["text"], f"{place}.content")
    kind = part.get("type") if isinstance(part, Mapping) else describe(part)
    raise Unusable("bad-message", f"{place} has a part of type {kind!r}; only parts of type 'text' can be trained on")


def _parsed(value: Any, place: str) -> Any:
    """A JSON value that may be written as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unusable(
            "bad-tool-call", f"{place} is {value!r:.60}, which is not JSON; expected {{name, arguments}}"
        ) from error


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a list, or of one call, in one form."""
    if value == []:
        raise Unusable("bad-tool-call", f"{place} calls nothing; expected an object with name and arguments")
    calls = []
    for written in value if isinstance(value, list) else [value]:
        call = plain_call(written)
        if call is None:
            raise Unusable(
                "bad-tool-call", f"{place} calls {describe(written)}; expected an object with name and arguments"
            )
        calls.append(call)
    return calls


def tool_schemas(value: Any) -> list[dict[str, Any]]:
    """Tools as {"type": "function", "function": {...}}, from a list or its JSON; empty where there are none."""
    if value is None or value == "":
        return []
    value = _parsed(value, "column 'tools'")
    schemas = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, Mapping) or not isinstance(item.get("function", item), Mapping):
            raise Unusable("bad-tools", f"column 'tools' holds {describe(item)}; expected objects with a name")
        schemas.append(dict(item) if "function" in item else {"type": "function", "function": dict(item)})
    return schemas
