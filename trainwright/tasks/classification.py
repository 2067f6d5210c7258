"""Classification of texts and pairs of texts: one label, several labels, or a number."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks.labelled import ClassificationSection
from trainwright.data.examples.example import IGNORE, Encoded, Example, ExampleEncoder, Feature
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.labelled_classes import ClassObjective, Problem, probabilities
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, Frame, frame_of
from trainwright.tasks.labels import LabelNames, class_weights, label_name, place_of
from trainwright.tasks.metrics.classes import several, single
from trainwright.tasks.metrics.correlation import number_scores
from trainwright.tasks.task import LISTED_ERRORS, Batch, LossOutput, Metric, Record, Report, Table

__all__ = ["Classification", "ClassificationDefinition", "TextEncoder"]

BEST = {
    "single_label": Metric("accuracy", higher=True),
    "multi_label": Metric("f1_micro", higher=True),
    "regression": Metric("pearson", higher=True),
}


@dataclass(frozen=True)
class ClassificationDefinition:
    """Classification as the recipe says it; `max_length` counts the tokens of a row."""

    section: ClassificationSection
    max_length: int
    name = "classification"
    shape = "labelled"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer that is trained for this task must have."""
        return ENCODER_TOKENS if self.section.frame == "encoder" else ()

    def survey(self, records: Iterable[Record]) -> dict[str, Any]:
        """What a label is, which ones there are and how often, and whether any record is a pair.

        Raises:
            DataError: labels are of different kinds, or are none that `problem` asks for.
        """
        problem = self.section.problem
        counts: Counter[str] = Counter()
        kinds: dict[str, str] = {}
        rows = labelled = pairs = 0
        for record in records:
            rows += 1
            pairs += record.get("text2") is not None
            label = record.get("label")
            if label is None:
                continue
            labelled += 1
            if problem == "auto":
                kinds.setdefault(_kind(label), place_of(record))
            elif problem == "regression":
                _number(label, record)
            counts.update(_names(label))
        if problem == "auto":
            problem = _only_kind(kinds)
        if problem == "regression":
            counts.clear()
        return {"problem": problem, "counts": dict(counts), "rows": rows, "labelled": labelled, "pairs": pairs > 0}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> Classification:
        """The task for these labels. Raises ConfigError where rows are too short for any text, and for options that do
        nothing with labels of this kind."""
        section = self.section
        problem: Problem = survey["problem"]
        _refuse_idle(section, problem)
        if problem == "regression":
            labels = LabelNames(["value"])
        else:
            labels = LabelNames.of_training(survey["counts"], section.labels, unseen_as=section.unseen_as)
        frame = frame_of(tokenizer, section.frame)
        if self.max_length < frame.two.size + 2:
            raise ConfigError(
                f"data.sequence_length is {self.max_length}, and {frame.two.size} tokens stand around a pair of texts"
            )
        encoder = TextEncoder(
            tokenizer, frame, labels, problem, self.max_length, typed=bool(survey["pairs"]), cut=section.cut
        )
        return Classification(section, problem, labels, encoder, int(survey["labelled"]))


def _refuse_idle(section: ClassificationSection, problem: Problem) -> None:
    """What the recipe could not know while `problem` was auto."""
    settled = section.model_copy(update={"problem": problem})
    reasons = {**settled.without_effect(), **{key: f"expected {wanted}" for key, wanted in settled.problems()}}
    for key, reason in reasons.items():
        if getattr(section, key) != type(section).model_fields[key].default:
            raise ConfigError(
                f"task.{key} is {getattr(section, key)!r}, and the labels of the training data make the problem "
                f"{problem}: {reason}",
                hint=f"leave task.{key} out, or name another task.problem",
            )


def _kind(label: Any) -> str:
    if isinstance(label, (list, tuple)):
        return "multi_label"
    return "regression" if isinstance(label, float) else "single_label"


def _only_kind(kinds: Mapping[str, str]) -> Problem:
    if not kinds:
        raise DataError("no training record has a label", hint="name the column: data.columns: {label: NAME}")
    if len(kinds) > 1:
        what = {"multi_label": "lists of labels", "regression": "numbers", "single_label": "names"}
        seen = " and ".join(f"{what[kind]} ({place.removesuffix(': ') or 'a record'})" for kind, place in kinds.items())
        raise DataError(f"labels are {seen}; expected one kind", hint="write task.problem, or mend the data")
    problem: Any = next(iter(kinds))
    return problem


def _names(label: Any) -> list[str]:
    values = label if isinstance(label, (list, tuple)) else [label]
    return list(dict.fromkeys(label_name(value) for value in values))


def _number(label: Any, record: Record) -> float:
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
            return np.asarray(math.nan if label is None else _number(label, record), dtype=np.float32)
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
        for name in _names(label):
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


class Classification:
    """Classification with labels that are known. Made by `ClassificationDefinition.bind`."""

    name = "classification"

    def __init__(
        self, section: ClassificationSection, problem: Problem, labels: LabelNames, encoder: TextEncoder, rows: int
    ) -> None:
        self.section = section
        self.problem = problem
        self.labels = labels
        self.encoder: ExampleEncoder = encoder
        self.best = BEST[problem]
        self.head: HeadSpec | None = HeadSpec(
            "sequence", labels.names, pooling=section.pooling, dropout=section.head_dropout, problem=problem
        )
        weights = None
        if problem == "single_label":
            weights = class_weights(labels, section.class_weights)
        elif problem == "multi_label":
            weights = _positive_weights(labels, section.class_weights, rows)
        self.objective = ClassObjective(
            problem,
            None if weights is None else tuple(weights),
            section.focal_gamma,
            section.label_smoothing if problem == "single_label" else 0.0,
            section.r_drop,
        )

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The training objective, summed over the labelled rows."""
        return self.objective.loss(model, batch)

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The plain loss, and the scores [B, L] that predictions are made of."""
        return self.objective.evaluate(model, batch)

    # --- predictions ---

    def predict(self, records: Sequence[Record], outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Each record's text with its "label" as the data has it, and "probability" by label where there are any."""
        return [self._prediction(record, output["scores"][0]) for record, output in zip(records, outputs, strict=True)]

    def _prediction(self, record: Record, scores: Any) -> dict[str, Any]:
        found: dict[str, Any] = {key: record[key] for key in ("id", "text", "text2") if record.get(key) is not None}
        if self.problem == "regression":
            return {**found, "label": float(scores[0])}
        shares = probabilities(scores, self.problem)
        by_label = {name: float(share) for name, share in zip(self.labels.names, shares, strict=True)}
        if self.problem == "multi_label":
            chosen = [name for name, share in by_label.items() if share >= self.section.threshold]
            return {**found, "label": chosen, "probability": by_label}
        return {**found, "label": self.labels.names[int(shares.argmax())], "probability": by_label}

    # --- the report ---

    def report(self, records: Sequence[Record], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """How the predictions compare with the records that have a label.

        Raises:
            DataError: none has one, or one has a label that is not known.
        """
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if r.get("label") is not None]
        if not pairs:
            raise DataError("no record has a label to compare predictions with")
        if self.problem == "regression":
            return _number_report(pairs)
        if self.problem == "multi_label":
            return self._several_report(pairs)
        true = [self.labels.index(label_name(record["label"])) for record, _ in pairs]
        given = [self.labels.index(prediction["label"]) for _, prediction in pairs]
        metrics, table, confusion = single(true, given, self.labels.names)
        errors = [
            {
                **_texts(record),
                "expected": self.labels.names[expected],
                "predicted": self.labels.names[predicted],
                "probability": prediction["probability"][self.labels.names[predicted]],
            }
            for (record, prediction), expected, predicted in zip(pairs, true, given, strict=True)
            if expected != predicted
        ]
        errors.sort(key=lambda error: -float(error["probability"]))  # the surest first: they show wrong labels
        return Report(metrics, (table,), self.labels.names, confusion.tolist(), tuple(errors[:LISTED_ERRORS]))

    def _several_report(self, pairs: Sequence[tuple[Record, Mapping[str, Any]]]) -> Report:
        def hot(names: Iterable[str]) -> list[int]:
            there = {self.labels.known(name) for name in names}
            return [int(name in there) for name in self.labels.names]

        true = [hot(_names(record["label"])) for record, _ in pairs]
        given = [hot(prediction["label"]) for _, prediction in pairs]
        metrics, table = several(true, given, self.labels.names)
        errors = [
            {
                **_texts(record),
                "expected": [name for name, on in zip(self.labels.names, expected, strict=True) if on],
                "predicted": list(prediction["label"]),
                "probability": prediction["probability"],
            }
            for (record, prediction), expected, predicted in zip(pairs, true, given, strict=True)
            if expected != predicted
        ]
        return Report(metrics, (table,), self.labels.names, errors=tuple(errors[:LISTED_ERRORS]))


def _positive_weights(labels: LabelNames, given: str | Mapping[str, float], rows: int) -> list[float] | None:
    """Weights of the positive decisions; "auto": how many texts do not have the label for each that has it."""
    if given == "none":
        return None
    if given == "auto":
        counts = [max(labels.counts.get(name, 0), 1) for name in labels.names]
        return [max(rows - count, 1) / count for count in counts]
    assert not isinstance(given, str)
    class_weights(labels, given)  # refuses names that are no labels
    return [given.get(name, 1.0) for name in labels.names]


def _texts(record: Record) -> dict[str, Any]:
    return {key: record[key] for key in ("where", "id", "text", "text2") if record.get(key) is not None}


def _number_report(pairs: Sequence[tuple[Record, Mapping[str, Any]]]) -> Report:
    true = [_number(record["label"], record) for record, _ in pairs]
    given = [float(prediction["label"]) for _, prediction in pairs]
    metrics = number_scores(true, given)
    table = Table("numbers", ("", "value"), (*metrics.items(), ("texts", len(pairs))))
    worst = sorted(zip(pairs, true, given, strict=True), key=lambda entry: -abs(entry[1] - entry[2]))
    errors = tuple(
        {**_texts(record), "expected": expected, "predicted": predicted}
        for (record, _), expected, predicted in worst[:LISTED_ERRORS]
    )
    return Report(metrics, (table,), errors=errors)
