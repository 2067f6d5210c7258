"""Texts and pairs of texts as rows, with what is said of them as labels."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from trainwright.base.errors import DataError
from trainwright.data.examples.example import IGNORE, Encoded, Example, Feature
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.tasks.labelled_classes import Problem
from trainwright.tasks.labelled_frame import Frame
from trainwright.tasks.labels import LabelNames, label_name, place_of
from trainwright.tasks.task import Record

__all__ = ["TextEncoder", "names_of", "number_of"]


def names_of(label: Any) -> list[str]:
    """The names of a label or of a list of labels, each once."""
    values = label if isinstance(label, (list, tuple)) else [label]
    return list(dict.fromkeys(label_name(value) for value in values))


def number_of(label: Any, record: Record) -> float:
    """The number that a label is. Raises DataError where it is none, or not finite."""
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{place_of(record)}label is {label!r:.60}; expected a number",
            hint="name another column: data.columns: {label: NAME}, or write task.problem: single_label",
        )
    return value


class TextEncoder:
    """Rows of texts and pairs. Pure, and can be pickled."""

    packable = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        frame: Frame,
        labels: LabelNames,
        problem: Problem,
        max_length: int,
        *,
        typed: bool = False,
        cut: str = "end",
    ) -> None:
        self.tokenizer = tokenizer
        self.frame = frame
        self.labels = labels
        self.problem = problem
        self.max_length = max_length
        self.typed = typed and frame.typed
        self.cut = cut
        target = {
            "single_label": Feature("labels", "int64", "row", IGNORE),
            "multi_label": Feature("labels", "float32", "row", math.nan, (len(labels),)),
            "regression": Feature("labels", "float32", "row", math.nan),
        }[problem]
        pad = tokenizer.pad_id
        ids = Feature("input_ids", "int32", "tokens", 0 if pad is None else pad)
        types = (Feature("token_type_ids", "int32", "tokens"),) if self.typed else ()
        self.features: tuple[Feature, ...] = (ids, *types, target)
        names = [] if problem == "regression" else [labels.names, labels.unseen_as]
        facts = ["classification", 1, problem, names, max_length, cut, self.typed, repr(frame)]
        self.fingerprint = json.dumps(facts, ensure_ascii=False)

    def encode(self, record: Record) -> Encoded:
        """One row. Raises DataError for a label that the training data does not have."""
        first = self.tokenizer.encode(record["text"], parse_special=False)
        other = record.get("text2")
        second = None if other is None else self.tokenizer.encode(other, parse_special=False)
        size = (self.frame.one if second is None else self.frame.two).size
        before = len(first) + len(second or ())
        first, second = _fit(first, second, self.max_length - size, self.cut)
        arrays: dict[str, Any] = {}
        if second is None:
            ids = self.frame.single(first)
            types = [0] * len(ids)
        else:
            ids, types = self.frame.pair(first, second), self.frame.pair_types(len(first), len(second))
        if not ids:
            return Encoded(dropped="the text is empty")
        arrays["input_ids"] = np.asarray(ids, dtype=np.int32)
        if self.typed:
            arrays["token_type_ids"] = np.asarray(types, dtype=np.int32)
        arrays["labels"] = self.target(record)
        return Encoded((Example(arrays),), cut_tokens=before - len(first) - len(second or ()))

    def target(self, record: Record) -> Any:
        """The label as an array; what is not trained where the record has none."""
        label = record.get("label")
        if self.problem == "regression":
            return np.asarray(math.nan if label is None else number_of(label, record), dtype=np.float32)
        if self.problem == "single_label":
            if label is None:
                return np.asarray(IGNORE, dtype=np.int64)
            if isinstance(label, (list, tuple)):
                raise DataError(
                    f"the label is a list ({label!r:.60}); expected one label", hint="write task.problem: multi_label"
                )
            return np.asarray(self.labels.index(label_name(label)), dtype=np.int64)
        if label is None:
            return np.full(len(self.labels), math.nan, dtype=np.float32)
        several_hot = np.zeros(len(self.labels), dtype=np.float32)
        for name in names_of(label):
            several_hot[self.labels.index(name)] = 1.0
        return several_hot


def _fit(first: list[int], second: list[int] | None, room: int, cut: str) -> tuple[list[int], list[int] | None]:
    """Both texts cut to `room` tokens together; of a pair the longer one gives first."""
    if second is None:
        return _shorten(first, room, cut), None
    small = room // 2
    if len(first) + len(second) > room:
        if len(first) <= small:
            second = _shorten(second, room - len(first), cut)
        elif len(second) <= room - small:
            first = _shorten(first, room - len(second), cut)
        else:
            first, second = _shorten(first, small, cut), _shorten(second, room - small, cut)
    return first, second


def _shorten(ids: list[int], room: int, cut: str) -> list[int]:
    if len(ids) <= room:
        return ids
    if cut == "start":
        return ids[len(ids) - room :]
    if cut == "middle":
        head = (room + 1) // 2
        return ids[:head] + ids[len(ids) - (room - head) :]
    return ids[:room]
