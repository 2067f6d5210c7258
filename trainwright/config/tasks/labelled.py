"""Tasks whose targets are labels of texts, tokens, pairs of entities, or spans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from trainwright.config.fields import Auto, Listed, Name, Real, Truth, Whole, Words, Written
from trainwright.config.tasks.base import TaskSection

__all__ = ["ClassificationSection", "LabelledSection", "NERSection", "QASection", "RelationSection"]

_NAME = Name(what_it_is="the name of a label")


@dataclass(frozen=True)
class Weights(Written):
    """A positive number for each label."""

    @property
    def what(self) -> str:
        return "a mapping of labels to numbers above 0"

    def read(self, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise ValueError
        found = {}
        for label, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError
            found[str(label)] = float(weight)
        return found

    def json(self) -> dict[str, Any]:
        return {"type": "object", "minProperties": 1, "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}


ClassWeights = Annotated[Literal["none", "auto"] | dict[str, float], Weights(("none", "auto"))]
Labels = Annotated[tuple[str, ...] | None, Listed((None,), _NAME)]


class LabelledSection(TaskSection):
    """A task whose targets are labels, not tokens."""

    frame: Annotated[Literal["auto", "encoder", "decoder"], Words(("auto", "encoder", "decoder"))] = "auto"
    """What stands around a text: what the tokenizer itself puts there, else [CLS] and [SEP] where it has them (auto).
    encoder: [CLS] and [SEP], which a tokenizer that the run trains then gets; decoder: as auto, without these two."""
    head_dropout: Annotated[float, Real(minimum=0, below=1)] = 0.1
    """Dropout in front of the head."""


class _Classes(LabelledSection):
    """A task that gives one of several labels to a text."""

    counted: ClassVar[str] = "texts"

    labels: Labels = None
    """The labels in their order; null takes those of the training data, sorted."""
    unseen_as: Annotated[str | None, Name((None,), what_it_is="the name of a label")] = None
    """Label that stands for those that the training data does not have; null makes them an error."""
    class_weights: ClassWeights = "none"
    """Weight of each label's texts in the loss, scaled so that the mean over the training texts is 1; auto is inversely
    proportional to how many texts a label has. Of several labels a text: weight of the positive decisions."""
    focal_gamma: Annotated[float, Real(minimum=0)] = 0.0
    """Focal loss (arXiv 1708.02002): weighs each text by (1 - p)^gamma, p the probability of its label; 0 is off."""
    r_drop: Annotated[float, Real(minimum=0)] = 0.0
    """R-Drop (arXiv 2106.14448): weight of the distance between the predictions of two dropouts; 0 is off."""


class ClassificationSection(_Classes):
    """One label, several labels, or a number for a text or a pair of texts."""

    pooling: Annotated[Literal["auto", "first", "last", "mean"], Words(("auto", "first", "last", "mean"))] = "auto"
    """Which vectors the head reads; auto: the first token's of an encoder, the last one's of a decoder."""
    problem: Annotated[
        Literal["auto", "single_label", "multi_label", "regression"],
        Words(("auto", "single_label", "multi_label", "regression")),
    ] = "auto"
    """What a label is; auto reads it off the training data."""
    threshold: Annotated[float, Real(above=0, below=1)] = 0.5
    """Labels of at least this probability are predicted, where a text may have several."""
    cut: Annotated[Literal["end", "start", "middle"], Words(("end", "start", "middle"))] = "end"
    """Which part of a text that is too long is left out."""

    def without_effect(self) -> Mapping[str, str]:
        idle = {}
        if self.problem != "multi_label" and self.problem != "auto":
            idle["threshold"] = f"problem {self.problem} has no threshold"
        if self.problem == "regression":
            why = "problem regression has no labels, but numbers"
            idle |= dict.fromkeys(("labels", "unseen_as", "class_weights", "focal_gamma", "label_smoothing"), why)
        return idle

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.problem == "multi_label" and self.label_smoothing:
            yield "label_smoothing", "0: it is not defined where a text may have several labels"


class NERSection(LabelledSection):
    """A tag for every word."""

    counted: ClassVar[str] = "words"

    scheme: Annotated[Literal["bio", "bioes"], Words(("bio", "bioes"))] = "bio"
    """Tags that the model learns; bioes tells the last word of an entity, and single words, apart. Files are read and
    predictions written whatever this is."""
    crf: Annotated[bool, Truth()] = False
    """Score transitions between tags too: a linear-chain conditional random field (Lafferty et al. 2001)."""
    constrained: Annotated[bool, Truth()] = True
    """Predict the best sequence of tags that the scheme allows, not the best tag of each word."""
    label_on: Annotated[Literal["auto", "first", "last", "all"], Words(("auto", "first", "last", "all"))] = "auto"
    """Which tokens of a word are trained; predictions read the first of these. auto: first, but last where texts are
    framed for a decoder, which has not read the word before its last token."""
    overlap: Annotated[int | Auto, Whole(("auto",))] = "auto"
    """Tokens that two windows of a sentence that is too long share; auto is a quarter of a window."""
    labels: Labels = None
    """Types of entities; null takes those of the training data, sorted."""
    unseen_as: Annotated[str | None, Name((None,), what_it_is="a type of entity, or O")] = None
    """Type that stands for those that the training data does not have; O for none. null makes them an error."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.crf and self.label_on == "all":
            yield "label_on", "auto, first or last: with crf one token of a word is tagged"
        if self.scheme == "bioes" and self.label_on == "all":
            yield "label_on", "auto, first or last: with bioes one token of a word is tagged"
        if self.crf and self.label_smoothing:
            yield "label_smoothing", "0: it is not defined for sequences of tags (crf)"


class RelationSection(_Classes):
    """The relation between two marked entities."""

    other: Annotated[str | None, Name((None, "auto"), what_it_is="the name of a label")] = "auto"
    """Label that is no relation of interest and is left out of the scores; auto: Other, no_relation, NA or none, where
    there is one of these; null: every label counts."""


class QASection(LabelledSection):
    """The span of a text that answers a question."""

    counted: ClassVar[str] = "answer boundaries"

    doc_stride: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Tokens of the text after which the next window of a text that is too long begins; auto is half of a window."""
    max_question: Annotated[int, Whole(minimum=1)] = 64
    """Longest question in tokens; what is beyond is cut."""
    max_answer: Annotated[int, Whole(minimum=1)] = 30
    """Longest answer in tokens."""
    n_best: Annotated[int, Whole(minimum=1)] = 20
    """How many starts and ends of each window are paired, and how many answers a prediction lists at most."""
    null_threshold: Annotated[float, Real()] = 0.0
    """A question has no answer where that scores by more than this above the best answer; the report names the value
    that would have been best."""
    scoring: Annotated[Literal["auto", "squad", "cmrc"], Words(("auto", "squad", "cmrc"))] = "auto"
    """Whose definition of exact match and F1: SQuAD's, or CMRC 2018's for Chinese; auto looks at the answers."""
