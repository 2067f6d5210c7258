"""The texts of a record: what a tokenizer learns from, by the record's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainwright.data.records.words import join_words

__all__ = ["record_texts"]

_FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "labelled": ("text", "text2"),
    "qa": ("question", "context"),
    "pair": ("source", "target"),
    "anchors": ("anchor", "positive", "negatives"),
}


def record_texts(shape: str, record: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a record of a shape of `data.records`; labels, ids and roles are none."""
    if shape == "messages":
        if "messages" not in record:
            yield from _strings(record.get("text"))
        for message in record.get("messages", ()):
            yield from _strings(message.get("content"))
            yield from _strings(message.get("tool_calls"))
        yield from _strings(record.get("tools"))
    elif shape in ("tagged", "relation"):
        yield record["text"] if isinstance(record.get("text"), str) else join_words(record["tokens"])[0]
    else:
        for name in _FIELDS[shape]:
            yield from _strings(record.get(name))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)
