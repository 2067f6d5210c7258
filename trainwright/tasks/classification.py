"""Classification of texts and pairs of texts: one label, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks.labelled import ClassificationSection
from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.classification_encoder import TextEncoder, names_of, number_of
from trainwright.tasks.labelled_classes import ClassObjective, Problem, probabilities
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, frame_of
from trainwright.tasks.labels import LabelNames, class_weights, label_name, place_of
from trainwright.tasks.metrics.classes import several, single
from trainwright.tasks.metrics.correlation import number_scores
from trainwright.tasks.task import LISTED_ERRORS, PREDICT_INSTEAD, Batch, LossOutput, Metric, Record, Report, Table

__all__ = ["Classification", "ClassificationDefinition"]

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
                number_of(label, record)
            counts.update(names_of(label))
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
            raise DataError("no record has a label to compare predictions with", hint=PREDICT_INSTEAD)
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

        true = [hot(names_of(record["label"])) for record, _ in pairs]
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
    true = [number_of(record["label"], record) for record, _ in pairs]
    given = [float(prediction["label"]) for _, prediction in pairs]
    metrics = number_scores(true, given)
    table = Table("numbers", ("", "value"), (*metrics.items(), ("texts", len(pairs))))
    worst = sorted(zip(pairs, true, given, strict=True), key=lambda entry: -abs(entry[1] - entry[2]))
    errors = tuple(
        {**_texts(record), "expected": expected, "predicted": predicted}
        for (record, _), expected, predicted in worst[:LISTED_ERRORS]
    )
    return Report(metrics, (table,), errors=errors)
