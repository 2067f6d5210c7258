"""Conversations in the formats they are read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainwright.data.records.record import Unusable

__all__ = ["as_alpaca", "as_messages", "as_prompt_completion", "as_sharegpt"]

_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation"}
_PLAIN = {"role", "content"}


def _conversation(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Unusable("not-written", "a bare text, which this format cannot hold; it holds conversations")
    return messages


def _id(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": fields["id"]} if "id" in fields else {}


def as_messages(fields: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's: everything that a record can hold."""
    tools = {"tools": fields["tools"]} if fields.get("tools") else {}
    return {**_id(fields), "messages": _conversation(fields), **tools}


def as_sharegpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """from and value; calls of tools are turns of their own. Their ids are left out: the order tells the answers."""
    messages = list(_conversation(fields))
    row: dict[str, Any] = {**_id(fields)}
    if messages[0]["role"] == "system" and messages[0]["content"]:
        row["system"] = messages.pop(0)["content"]
    row["conversations"] = [_turn(message) for message in messages]
    if fields.get("tools"):
        row["tools"] = json.dumps([_bare(tool) for tool in fields["tools"]], ensure_ascii=False)
    return row


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    lost = set(message) - _PLAIN - {"tool_calls", "tool_call_id"}
    if lost:
        raise Unusable("not-written", f"a message has {', '.join(sorted(lost))}, which this format cannot hold")
    calls = message.get("tool_calls")
    if not calls:
        return {"from": _NAMES.get(message["role"], message["role"]), "value": message["content"]}
    if message["content"]:
        raise Unusable("not-written", "a message has both text and calls of tools, which this format cannot hold")
    functions = [call["function"] for call in calls]
    value = functions[0] if len(functions) == 1 else functions
    return {"from": "function_call", "value": json.dumps(value, ensure_ascii=False)}


def _bare(tool: Mapping[str, Any]) -> Any:
    return tool["function"] if set(tool) == {"type", "function"} and tool["type"] == "function" else tool


def _turns(fields: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The system text, and the texts of user and assistant in turn."""
    messages = list(_conversation(fields))
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if fields.get("tools") or any(set(message) - _PLAIN for message in messages):
        raise Unusable("not-written", "tools or further fields of messages, which this format cannot hold")
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable(
            "not-written", f"the turns {', '.join(roles)[:80]}; this format holds user and assistant in turn"
        )
    return system, [message["content"] for message in messages]


def as_alpaca(fields: Mapping[str, Any]) -> dict[str, Any]:
    """instruction (with its input), output, system, and the turns before as history."""
    system, texts = _turns(fields)
    row = {**_id(fields), "instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system
    if len(texts) > 2:
        row["history"] = [[texts[turn], texts[turn + 1]] for turn in range(0, len(texts) - 2, 2)]
    return row


def as_prompt_completion(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Texts where there is one question and its answer, else messages with the last one as the completion."""
    messages = _conversation(fields)
    tools = {"tools": fields["tools"]} if fields.get("tools") else {}
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable("not-written", "the last message is not the assistant's, so that nothing is the completion")
    if [set(message) == _PLAIN and message["role"] for message in messages] == ["user", "assistant"]:
        return {**_id(fields), "prompt": messages[0]["content"], "completion": messages[1]["content"], **tools}
    return {**_id(fields), "prompt": list(messages[:-1]), "completion": [messages[-1]], **tools}
