"""Conversations: messages, ShareGPT, Alpaca, prompts with completions, and plain texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.messages import json_list, message, messages_from, tool_schemas
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.running_text import text_formats
from trainwright.data.records.tables import looks_like_rows

__all__ = ["CHAT", "messages_of"]

_SHAPE = SHAPES["messages"]
_Convert = Callable[[Mapping[str, Any], Columns], dict[str, Any]]


def _system(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    system = columns.find(row, "system")
    return [] if system is ABSENT or not system else [message("system", as_text(system, "system"))]


def _with_tools(fields: dict[str, Any], row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    tools = columns.find(row, "tools")
    schemas = [] if tools is ABSENT else tool_schemas(tools)
    return {**fields, "tools": schemas} if schemas else fields


def _chat(key: str) -> _Convert:
    def convert(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
        chat = columns.need(row, key)
        _refuse_preference(row)
        messages = messages_from(chat, key, columns)
        if not messages:
            raise Unusable("empty-conversation", f"column {key!r} has no messages")
        opening = [] if messages[0]["role"] == "system" else _system(row, columns)
        return _with_tools({"messages": [*opening, *messages]}, row, columns)

    return convert


def _refuse_preference(row: Mapping[str, Any]) -> None:
    """Pairs for preference learning hold a conversation without its answer."""
    if "chosen" in row and "rejected" in row:
        raise Unusable(
            "preference-pair",
            "the columns 'chosen' and 'rejected' make this a preference pair, whose conversation has no answer",
            "to learn the chosen answers: data.format: prompt_completion, data.columns: {prompt: the conversation's "
            "column, completion: chosen}",
        )


def _alpaca(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    messages = _system(row, columns)
    history = columns.find(row, "history")
    history = [] if history is ABSENT or history is None or history == "" else json_list(history)
    if not isinstance(history, list):
        raise Unusable("bad-history", f"column 'history' is {describe(history)}; expected [question, answer] pairs")
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Unusable("bad-history", f"column 'history' holds {describe(turn)}; expected [question, answer] pairs")
        messages += [message("user", as_text(turn[0], "history")), message("assistant", as_text(turn[1], "history"))]
    prompt = columns.text(row, "instruction")
    extra = columns.find(row, "input")
    if extra is not ABSENT and extra is not None and extra != "":
        prompt = f"{prompt}\n{as_text(extra, 'input')}" if prompt else as_text(extra, "input")
    messages.append(message("user", prompt))
    if columns.reads("output"):
        messages.append(message("assistant", columns.text(row, "output")))
    return _with_tools({"messages": messages}, row, columns)


def _prompt_completion(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if not columns.reads(column):
            continue
        value = columns.need(row, column)
        if isinstance(value, str):
            messages.append(message(role, as_text(value, column)))
        else:
            messages += messages_from([value] if isinstance(value, Mapping) else value, column, columns)
    opening = [] if messages and messages[0]["role"] == "system" else _system(row, columns)
    return _with_tools({"messages": [*opening, *messages]}, row, columns)


def _reader(convert: _Convert) -> Callable[[Opened], Iterator[Record]]:
    def read(opened: Opened) -> Iterator[Record]:
        columns = Columns(_SHAPE, opened.options)
        yield from opened.read_each(lambda row, _: [{**convert(row, columns), **columns.extras(row)}])

    return read


def _list_in(key: str) -> Callable[[Sequence[Mapping[str, Any]], Options], bool]:
    def matches(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
        columns = Columns(_SHAPE, options)
        return any(columns.has(row, key) and isinstance(json_list(columns.find(row, key)), list) for row in head)

    return matches


CHAT: tuple[Format, ...] = (
    Format(
        "messages",
        "rows",
        "messages: [{role, content, tool_calls}], and tools",
        ("messages",),
        _list_in("messages"),
        _reader(_chat("messages")),
    ),
    Format(
        "sharegpt",
        "rows",
        "conversations: [{from, value}], system, and tools",
        ("conversations",),
        _list_in("conversations"),
        _reader(_chat("conversations")),
    ),
    Format(
        "alpaca",
        "rows",
        "instruction, input, output, system, and history",
        ("instruction", "output"),
        looks_like_rows(_SHAPE, "instruction", "output"),
        _reader(_alpaca),
    ),
    Format(
        "prompt_completion",
        "rows",
        "prompt (or question, query, instruction) and completion (or response, answer), as text or messages",
        ("prompt", "completion"),
        looks_like_rows(_SHAPE, "prompt", "completion"),
        _reader(_prompt_completion),
    ),
    *text_formats(_SHAPE),
)


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a row in any of these formats, None when it has none."""
    options = Options()
    columns = Columns(_SHAPE, options)
    for one, convert in zip(
        CHAT[:4], (_chat("messages"), _chat("conversations"), _alpaca, _prompt_completion), strict=True
    ):
        if one.matches([row], options):
            try:
                messages: list[dict[str, Any]] = convert(row, columns)["messages"]
            except Unusable:
                return None
            return messages
    return None
