"""The table of formats: shape, then name, in the order in which a file is compared with them."""

from __future__ import annotations

from trainwright.data.records.chat import CHAT
from trainwright.data.records.labelled import LABELLED
from trainwright.data.records.opened import Format
from trainwright.data.records.pairs import ANCHORS, PAIRS
from trainwright.data.records.qa import QA
from trainwright.data.records.record import SHAPES
from trainwright.data.records.relation import RELATION
from trainwright.data.records.running_text import text_formats
from trainwright.data.records.tagged import TAGGED

__all__ = ["CONTAINERS", "FORMATS"]

CONTAINERS = ("jsonl", "json", "csv", "tsv")
"""Containers that may be named as a format, for files whose ending says something else."""

FORMATS: dict[str, dict[str, Format]] = {
    shape: {one.name: one for one in formats}
    for shape, formats in {
        "text": text_formats(SHAPES["text"]),
        "messages": CHAT,
        "labelled": LABELLED,
        "tagged": TAGGED,
        "relation": RELATION,
        "qa": QA,
        "pair": PAIRS,
        "anchors": ANCHORS,
    }.items()
}
"""Names of the formats of every shape."""
