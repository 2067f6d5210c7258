"""Questions with windows of their text as rows, and places of answers in tokens and in characters."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainwright.base.errors import ConfigError
from trainwright.data.examples.example import IGNORE, Encoded, Example, Feature, Piece
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.tasks.labelled_frame import Frame

__all__ = ["SpanEncoder"]

Offsets = list[tuple[int, int]]


class SpanEncoder:
    """Rows: the question, then a window of the text. Pure, and can be pickled.

    Every row has a place that stands for "no answer here": the first token of an encoder ([CLS]); the last one of a
    decoder, which has read the question and the window there.

    Args:
        doc_stride: tokens after which the next window begins; None for half of a window.
    """

    packable = False

    def __init__(
        self, tokenizer: Tokenizer, frame: Frame, max_length: int, *, max_question: int, doc_stride: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.frame = frame
        self.max_length = max_length
        self.max_question = max_question
        self.doc_stride = doc_stride
        self._end = () if frame.encoder else self._null_token()
        pad = tokenizer.pad_id
        ids = Feature("input_ids", "int32", "tokens", 0 if pad is None else pad)
        types = (Feature("token_type_ids", "int32", "tokens"),) if frame.typed else ()
        self.features: tuple[Feature, ...] = (
            ids,
            *types,
            Feature("answerable", "int32", "tokens", 0),  # 1: of the text; 2: stands for no answer
            Feature("null_place", "int64", "row"),
            Feature("labels", "int64", "row", IGNORE, (2,)),
        )
        facts = ["qa", 1, max_length, max_question, doc_stride, self._end, repr(frame)]
        self.fingerprint = json.dumps(facts)

    def _null_token(self) -> tuple[int, ...]:
        known = (self.tokenizer.special_id(role) for role in ("eos", "sep"))
        end = next((token for token in known if token is not None), None)
        ids = [end] if end is not None else self.tokenizer.encode("\n", parse_special=False)[:1]
        if not ids:
            raise ConfigError(
                "the tokenizer has no token that could stand for 'no answer' behind a text",
                hint="use one with [CLS], or with an end-of-text token",
            )
        return tuple(ids)

    @property
    def smallest_room(self) -> int:
        """Tokens of the text in a row beside the longest question."""
        return self.max_length - self.frame.two.size - len(self._end) - self.max_question

    def offsets(self, context: str) -> Offsets:
        """Where in the text each of its tokens stands, without spaces at the edges."""
        found = self.tokenizer.encode_with_offsets(context, parse_special=False)[1]
        return [_trimmed(context, start, end) for start, end in found]

    def characters(self, context: str, offsets: Offsets, first: int, last: int) -> tuple[int, int]:
        """The characters [start, end) of the tokens [first, last] of a text."""
        start, end = offsets[first][0], max(offsets[last][1], offsets[first][0])
        return _trimmed(context, start, end)

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """A row for every window of the text. A window without the answer learns that there is none in it."""
        context = record["context"]
        question = self.tokenizer.encode(record["question"].strip(), parse_special=False)
        cut = max(0, len(question) - self.max_question)
        question = question[: self.max_question]
        ids = self.tokenizer.encode(context, parse_special=False)
        if not ids:
            return Encoded(dropped="the text is empty")
        answer = self._answer(record)
        room = self.max_length - self.frame.two.size - len(self._end) - len(question)
        stride = self.doc_stride if self.doc_stride is not None else max(1, room // 2)
        stride = min(stride, room)
        firsts = list(range(0, max(1, len(ids) - room + stride), stride))
        firsts = [first for number, first in enumerate(firsts) if number == 0 or firsts[number - 1] + room < len(ids)]
        examples = [
            self._window(question, ids[first : first + room], first, answer, number, len(firsts))
            for number, first in enumerate(firsts)
        ]
        return Encoded(tuple(examples), cut_tokens=cut)

    def _answer(self, record: Mapping[str, Any]) -> tuple[int, int] | str | None:
        """Tokens [first, last] of the first answer; "none" where there is no answer; None where that is not known, or
        the text does not have the answer where it should stand."""
        answers = record.get("answers")
        if answers is None:
            return None
        if not answers["text"]:
            return "none"
        text, start = answers["text"][0], answers["answer_start"][0]
        if not text or record["context"][start : start + len(text)] != text:
            return None
        return _tokens_at(self.offsets(record["context"]), start, start + len(text))

    def _window(
        self,
        question: Sequence[int],
        window: Sequence[int],
        first: int,
        answer: tuple[int, int] | str | None,
        number: int,
        count: int,
    ) -> Example:
        ids = [*self.frame.pair(question, window), *self._end]
        at = len(self.frame.two.before) + len(question) + len(self.frame.two.between)
        null = 0 if self.frame.encoder else len(ids) - 1
        answerable = np.zeros(len(ids), dtype=np.int32)
        answerable[at : at + len(window)] = 1
        answerable[null] = 2
        labels = [IGNORE, IGNORE]
        if isinstance(answer, tuple) and first <= answer[0] and answer[1] < first + len(window):
            labels = [answer[0] - first + at, answer[1] - first + at]
        elif answer is not None:
            labels = [null, null]
        arrays: dict[str, Any] = {
            "input_ids": np.asarray(ids, dtype=np.int32),
            "answerable": answerable,
            "null_place": np.asarray(null, dtype=np.int64),
            "labels": np.asarray(labels, dtype=np.int64),
        }
        if self.frame.typed:
            types = self.frame.pair_types(len(question), len(window))
            arrays["token_type_ids"] = np.asarray([*types, *([0] * len(self._end))], dtype=np.int32)
        return Example(arrays, Piece(number, count, {"first": first, "at": at}))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) without spaces at its edges: many tokenizers count the space before a word to its token."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _tokens_at(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """The tokens [first, last] that cover the characters [start, end); None where no token does."""
    ends = [stop for _, stop in offsets]
    first = bisect.bisect_right(ends, start)
    last = first
    while last + 1 < len(offsets) and offsets[last + 1][0] < end:
        last += 1
    while last > first and offsets[last][0] >= offsets[last][1]:  # a token of spaces alone
        last -= 1
    if first >= len(offsets) or offsets[first][0] >= end:
        return None
    return first, last
