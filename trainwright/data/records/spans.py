"""Marked parts of a text, as annotation tools write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.data.records.columns import describe
from trainwright.data.records.record import Unusable
from trainwright.data.records.words import Part

__all__ = ["cluener_parts", "listed_parts"]

_STARTS = ("start", "start_offset", "begin", "start_idx", "start_char")
_ENDS = ("end", "end_offset", "stop", "end_idx", "end_char")
_LABELS = ("label", "type", "entity", "entity_type", "tag", "labels", "entity_group")


def cluener_parts(value: Any, text: str) -> list[Part]:
    """Of `{type: {mention: [[first, last], ...]}}`, where `last` is the last character itself (CLUENER 2020)."""
    if not isinstance(value, Mapping):
        raise Unusable("bad-entities", f"column 'label' is {describe(value)}; expected {{type: {{mention: [[0, 3]]}}}}")
    parts = []
    for kind, mentions in value.items():
        if not isinstance(mentions, Mapping):
            raise Unusable(
                "bad-entities",
                f"column 'label': {kind!r} is {describe(mentions)}; expected {{mention: [[first, last]]}}",
            )
        for mention, places in mentions.items():
            for place in places if isinstance(places, list) else [places]:
                start, end = _two_numbers(place)
                parts.append(_checked(start, end + 1, str(kind), text, str(mention)))
    return parts


def listed_parts(value: Any, text: str) -> list[Part]:
    """Of a list of objects with start, end and label, or of [start, end, label] (doccano); `end` is behind the last."""
    if not isinstance(value, list):
        raise Unusable("bad-entities", f"column 'entities' is {describe(value)}; expected a list of parts")
    parts = []
    for item in value:
        if isinstance(item, Mapping):
            start, end = _two_numbers([_first(item, _STARTS), _first(item, _ENDS)])
            label = _first(item, _LABELS)
            label = label[0] if isinstance(label, list) and len(label) == 1 else label
            mention = item.get("text", item.get("word"))
        elif isinstance(item, (list, tuple)) and len(item) == 3:
            start, end = _two_numbers(item[:2])
            label, mention = item[2], None
        else:
            raise Unusable(
                "bad-entities",
                f"column 'entities' holds {describe(item)}; expected {{start, end, label}} or [start, end, label]",
            )
        if not isinstance(label, str) or not label:
            raise Unusable("bad-entities", f"an entity's label is {describe(label)}; expected its name")
        parts.append(_checked(start, end, label, text, mention if isinstance(mention, str) else None))
    return parts


def _first(item: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if item.get(name) is not None:
            return item[name]
    raise Unusable(
        "bad-entities", f"an entity has {', '.join(map(str, item)) or 'nothing'}; expected one of {', '.join(names)}"
    )


def _two_numbers(place: Any) -> tuple[int, int]:
    if isinstance(place, (list, tuple)) and len(place) == 2 and all(type(number) is int for number in place):
        return place[0], place[1]
    raise Unusable("bad-entities", f"a place of an entity is {describe(place)}; expected two whole numbers")


def _checked(start: int, end: int, kind: str, text: str, mention: str | None) -> Part:
    if not 0 <= start < end <= len(text):
        raise Unusable(
            "bad-entities", f"entity {kind!r} from {start} to {end} lies outside of the text of {len(text)} characters"
        )
    if mention is not None and text[start:end] != mention:
        raise Unusable(
            "bad-entities",
            f"entity {kind!r} from {start} to {end} is {text[start:end]!r:.40} in the text, and the file says "
            f"{mention!r:.40}",
            "offsets are in characters from 0; `end` is behind the last (in CLUENER's format it is the last itself)",
        )
    return start, end, kind
