"""One record of a task's data, the shapes that records have, and what is wrong with one that has none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.data.documents import Problems

__all__ = ["NOTES", "SHAPES", "TASK_SHAPES", "Record", "Shape", "Unusable", "dropped_records"]


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `where` is for people (file:line); `key` is the same on every machine: splits are drawn from it."""

    fields: Mapping[str, Any]
    where: str
    key: str


@dataclass(frozen=True)
class Shape:
    """What the records of a task have in common.

    Attributes:
        needs: keys that every record has.
        target: the key that is learnt; it may be absent from records that are only predicted on.
        optional: other keys that a record may have.
        columns: what `data.columns` may rename, each with the names by which a column is recognised without renaming,
            best first.
        answers: of these, what says what is learnt: records that are only predicted for are read without them.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    target: str | None
    optional: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    answers: tuple[str, ...] = ()


_ID = ("id", "guid", "idx", "uid", "qid", "query_id", "fname")
_SENTENCES = ("text", "sentence", "sentence1", "text1", "text_a", "premise", "question1", "review", "content")
_TEXTS = (*_SENTENCES, "review_body", "comment", "tweet", "utterance", "headline", "title")
_CLASSES = ("label", "labels", "label_text", "label_name", "category", "class", "intent", "sentiment", "coarse_label")
_LABELS = (*_CLASSES, "stars", "rating", "score", "target", "topic")

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "text", "running text", ("text",), None, ("id",), {"text": ("text", "content", "document"), "id": ("id",)}
        ),
        Shape(
            "messages",
            "a conversation",
            ("messages",),
            None,
            ("tools", "text", "id"),
            {
                "messages": ("messages",),
                "conversations": ("conversations", "conversation"),
                "role": ("role", "from"),
                "content": ("content", "value"),
                "instruction": ("instruction",),
                "input": ("input",),
                "output": ("output",),
                "history": ("history",),
                "prompt": ("prompt", "question", "query", "instruction"),
                "completion": ("completion", "response", "answer"),
                "system": ("system",),
                "tools": ("tools",),
                "text": ("text",),
                "id": ("id",),
            },
            answers=("output", "completion"),
        ),
        Shape(
            "labelled",
            "a text, or two, with a label",
            ("text",),
            "label",
            ("text2", "id"),
            {
                "text": _TEXTS,
                "text2": ("text2", "sentence2", "text_b", "hypothesis", "question2"),
                "label": _LABELS,
                "id": _ID,
            },
            answers=("label",),
        ),
        Shape(
            "tagged",
            "words with tags",
            ("tokens",),
            "tags",
            ("text", "offsets", "id"),
            {
                "tokens": ("tokens", "words"),
                "tags": ("tags", "ner_tags", "ner", "labels", "pos_tags", "chunk_tags"),
                "text": ("text", "sentence", "content"),
                "entities": ("entities", "spans", "label", "labels"),
                "id": _ID,
            },
            answers=("tags", "entities"),
        ),
        Shape(
            "relation",
            "two entities of a sentence and the relation between them",
            ("tokens", "head", "tail"),
            "relation",
            ("id",),
            {
                "tokens": ("tokens", "token", "sentence", "words"),
                "head": ("head", "h", "subj", "subject"),
                "tail": ("tail", "t", "obj", "object"),
                "relation": ("relation", "label", "rel"),
                "id": _ID,
            },
            answers=("relation",),
        ),
        Shape(
            "qa",
            "a question whose answer is a span of a text",
            ("id", "context", "question"),
            "answers",
            ("is_impossible", "title"),
            {
                "context": ("context", "context_text", "passage", "paragraph"),
                "question": ("question", "query_text", "query"),
                "answers": ("answers", "answer"),
                "is_impossible": ("is_impossible",),
                "title": ("title",),
                "id": _ID,
            },
            answers=("answers", "is_impossible"),
        ),
        Shape(
            "pair",
            "a text and what it becomes",
            ("source",),
            "target",
            ("references", "id"),
            {
                "source": ("source", "src", "document", "dialogue", "article", "abstract", "source_text", "input"),
                "target": (
                    "target",
                    "tgt",
                    "summary",
                    "summary1",
                    "highlights",
                    "headline",
                    "title",
                    "target_text",
                    "output",
                ),
                "id": _ID,
            },
            answers=("target",),
        ),
        Shape(
            "anchors",
            "texts that belong together, and texts that do not",
            ("anchor", "positive"),
            None,
            ("negatives", "id"),
            {
                "anchor": ("anchor", "query", "question", "sentence1", "sentence_1", "text1", "premise"),
                "positive": ("positive", "pos", "answer", "sentence2", "sentence_2", "text2", "hypothesis"),
                "negatives": ("negatives", "negative", "neg", "hard_negatives"),
                "label": ("label", "is_duplicate"),
                "id": _ID,
            },
            answers=("label",),
        ),
    )
}

TASK_SHAPES: dict[str, str] = {
    "causal_lm": "text",
    "masked_lm": "text",
    "sft": "messages",
    "classification": "labelled",
    "ner": "tagged",
    "relation": "relation",
    "qa": "qa",
    "translation": "pair",
    "summarization": "pair",
    "dialogue": "messages",
    "embedding": "anchors",
}
"""Which shape the records of a task have."""

NOTES = frozenset(
    {"tags-repaired", "entity-widened", "entity-overlapping", "offset-repaired", "answer-dropped", "pair-apart"}
)
"""Kinds that are counted although no record was lost: what was mended, and pairs whose label says: not together."""


def dropped_records(problems: Problems) -> int:
    """How many rows, or parts of files, gave no record."""
    return sum(count for kind, count in problems.counts.items() if kind not in NOTES)


class Unusable(Exception):
    """What is wrong with one record; readers report it with the place, or refuse the file.

    Args:
        kind: under which it is counted.
        message: what was seen and what was expected, without the place.
        hint: the one-line fix.
    """

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
