"""Relations: what holds between two marked entities of a sentence (Baldini Soares et al. 2019, arXiv 1906.03158)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.config.tasks.labelled import RelationSection
from trainwright.data.examples.example import IGNORE, Encoded, Example, ExampleEncoder, Feature
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.labelled_classes import ClassObjective, probabilities
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, Frame, WordPieces, frame_of, spaces_before
from trainwright.tasks.labels import LabelNames, class_weights, label_name, place_of
from trainwright.tasks.metrics.classes import single
from trainwright.tasks.metrics.relations import relation_scores
from trainwright.tasks.task import LISTED_ERRORS, PREDICT_INSTEAD, Batch, LossOutput, Metric, Record, Report, Table

__all__ = ["MARKERS", "Relation", "RelationDefinition", "RelationEncoder", "marker_ids"]

MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")
"""Around the head and around the tail."""
SPARE = ("[unused{}]", "<unused{}>", "<|reserved_special_token_{}|>", "<extra_id_{}>")
"""Tokens that published vocabularies keep free, by number."""
PLAIN = ("@", "@", "#", "#")
"""What marks entities where a vocabulary has neither: punctuation, as Zhou and Chen (arXiv 2102.01373) have it."""
NO_RELATION = ("Other", "other", "no_relation", "NA", "none", "None")


@dataclass(frozen=True)
class RelationDefinition:
    """Relations as the recipe says them; `max_length` counts the tokens of a row."""

    section: RelationSection
    max_length: int
    name = "relation"
    shape = "relation"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer that is trained for this task must have."""
        return (*(ENCODER_TOKENS if self.section.frame == "encoder" else ()), *MARKERS)

    def survey(self, records: Iterable[Record]) -> dict[str, Any]:
        """The relations and how often each comes."""
        counts: Counter[str] = Counter()
        for record in records:
            if record.get("relation") is not None:
                counts[label_name(record["relation"])] += 1
        return {"counts": dict(counts)}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> Relation:
        """The task for these relations. Raises ConfigError for a name that is none of them, and for short rows."""
        section = self.section
        labels = LabelNames.of_training(survey["counts"], section.labels, unseen_as=section.unseen_as, what="relation")
        other = section.other
        if other == "auto":
            other = next((name for name in NO_RELATION if name in labels.names), None)
        elif other is not None and other not in labels.names:
            raise ConfigError(
                f"task.other is {other!r}, which is no relation of the training data: {labels.shown()}."
                f"{did_you_mean(other, labels.names)}"
            )
        frame = frame_of(tokenizer, section.frame)
        markers = marker_ids(tokenizer)
        needed = frame.one.size + sum(map(len, markers)) + 2
        if self.max_length < needed:
            raise ConfigError(f"data.sequence_length is {self.max_length}; marked entities need at least {needed}")
        return Relation(section, labels, other, RelationEncoder(tokenizer, frame, markers, labels, self.max_length))


def marker_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Ids of the four markers: of tokens of their own, of four that the vocabulary keeps free, or of plain signs."""
    for names in (MARKERS, *([pattern.format(number) for number in range(1, 5)] for pattern in SPARE)):
        found = [token for name in names if (token := tokenizer.core.token_to_id(name)) is not None]
        if len(found) == len(names):
            return tuple((token,) for token in found)
    return tuple(tuple(tokenizer.encode(sign, parse_special=False)) for sign in PLAIN)


class RelationEncoder:
    """Rows of sentences with marked entities. Pure, and can be pickled."""

    packable = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        frame: Frame,
        markers: tuple[tuple[int, ...], ...],
        labels: LabelNames,
        max_length: int,
    ) -> None:
        self.frame = frame
        self.markers = markers
        self.labels = labels
        self.max_length = max_length
        self._pieces = WordPieces(tokenizer)
        pad = tokenizer.pad_id
        self.features: tuple[Feature, ...] = (
            Feature("input_ids", "int32", "tokens", 0 if pad is None else pad),
            Feature("entity_starts", "int64", "row", 0, (2,)),
            Feature("labels", "int64", "row", IGNORE),
        )
        facts = ["relation", 1, labels.names, labels.unseen_as, max_length, markers, repr(frame)]
        self.fingerprint = json.dumps(facts, ensure_ascii=False)

    def encode(self, record: Record) -> Encoded:
        """One row. Raises DataError for entities outside the sentence and for a relation that training has not."""
        words = record["tokens"]
        head, tail = (_span(record, name) for name in ("head", "tail"))
        spaced = spaces_before(words)
        pieces = [self._pieces.ids(word, space) for word, space in zip(words, spaced, strict=True)]
        room = self.max_length - self.frame.one.size - sum(map(len, self.markers))
        kept = _nearest_words([len(piece) for piece in pieces], (head, tail), room)
        if kept is None:
            return Encoded(dropped=f"its two entities do not fit into {self.max_length} tokens")
        ids, starts = self._marked(pieces, kept, head, tail)
        arrays: dict[str, Any] = {
            "input_ids": np.asarray(self.frame.single(ids), dtype=np.int32),
            "entity_starts": np.asarray([len(self.frame.one.before) + start for start in starts], dtype=np.int64),
            "labels": np.asarray(self._label(record), dtype=np.int64),
        }
        cut = sum(len(piece) for word, piece in enumerate(pieces) if word not in kept)
        return Encoded((Example(arrays),), cut_tokens=cut)

    def _label(self, record: Record) -> int:
        relation = record.get("relation")
        return IGNORE if relation is None else self.labels.index(label_name(relation))

    def _marked(
        self, pieces: Sequence[list[int]], kept: set[int], head: tuple[int, int], tail: tuple[int, int]
    ) -> tuple[list[int], tuple[int, int]]:
        """Ids of the kept words with markers, and where the markers begin that the head of the model reads: those in
        front of the entities, but in a decoder, which has not read the entity there, those behind them."""
        spans = (head, tail)
        # of two entities that begin or end together the longer one stands outside
        outside = 0 if head[1] - head[0] >= tail[1] - tail[0] else 1
        opening, closing = (outside, 1 - outside), (1 - outside, outside)
        ids: list[int] = []
        places = [0, 0]
        for word, piece in enumerate(pieces):
            for entity in opening:
                if spans[entity][0] == word:
                    if self.frame.encoder:
                        places[entity] = len(ids)
                    ids += self.markers[2 * entity]
            if word in kept:
                ids += piece
            for entity in closing:
                if spans[entity][1] == word + 1:
                    if not self.frame.encoder:
                        places[entity] = len(ids)
                    ids += self.markers[2 * entity + 1]
        return ids, (places[0], places[1])


def _span(record: Record, name: str) -> tuple[int, int]:
    first, last = (int(value) for value in record[name])
    if not 0 <= first < last <= len(record["tokens"]):
        raise DataError(
            f"{place_of(record)}{name} is words [{first}, {last}) of {len(record['tokens'])}; expected a part of the "
            "sentence",
            hint="[start, end): the first word is 0, the end is not included",
        )
    return first, last


def _nearest_words(sizes: Sequence[int], spans: Sequence[tuple[int, int]], room: int) -> set[int] | None:
    """The words of both entities, and as many of the others as fit, nearest first; None where not even those fit."""

    def distance(word: int) -> int:
        return min(max(first - word, word - last + 1, 0) for first, last in spans)

    kept: set[int] = set()
    for word in sorted(range(len(sizes)), key=lambda word: (distance(word), word)):
        if sizes[word] > room:
            if distance(word) == 0:
                return None
            break
        room -= sizes[word]
        kept.add(word)
    return kept


class Relation:
    """Relations of known names. Made by `RelationDefinition.bind`.

    Attributes:
        other: the label that is no relation of interest, None where there is none.
    """

    name = "relation"
    best = Metric("f1_macro", higher=True)

    def __init__(
        self, section: RelationSection, labels: LabelNames, other: str | None, encoder: RelationEncoder
    ) -> None:
        self.section = section
        self.labels = labels
        self.other = other
        self.encoder: ExampleEncoder = encoder
        self.head: HeadSpec | None = HeadSpec("entities", labels.names, dropout=section.head_dropout)
        weights = class_weights(labels, section.class_weights)
        self.objective = ClassObjective(
            "single_label",
            None if weights is None else tuple(weights),
            section.focal_gamma,
            section.label_smoothing,
            section.r_drop,
        )

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The training objective, summed over the labelled rows."""
        return self.objective.loss(model, batch)

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The plain loss, and the scores [B, L] that predictions are made of."""
        return self.objective.evaluate(model, batch)

    def predict(self, records: Sequence[Record], outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Each record with its "relation", and "probability" by relation."""
        found: list[Mapping[str, Any]] = []
        for record, output in zip(records, outputs, strict=True):
            shares = probabilities(output["scores"][0], "single_label")
            found.append(
                {
                    **{key: record[key] for key in ("id", "tokens", "head", "tail") if record.get(key) is not None},
                    "relation": self.labels.names[int(shares.argmax())],
                    "probability": {name: float(share) for name, share in zip(self.labels.names, shares, strict=True)},
                }
            )
        return found

    def report(self, records: Sequence[Record], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """The official scores of SemEval-2010 task 8 (see `relation_scores`), and the table of single labels.

        Raises:
            DataError: no record has a relation.
        """
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if r.get("relation") is not None]
        if not pairs:
            raise DataError("no record has a relation to compare predictions with", hint=PREDICT_INSTEAD)
        true = [self.labels.known(label_name(record["relation"])) for record, _ in pairs]
        given = [str(prediction["relation"]) for _, prediction in pairs]
        metrics, table = relation_scores(true, given, self.other)
        numbers = [[self.labels.index(name) for name in names] for names in (true, given)]
        _, each, confusion = single(numbers[0], numbers[1], self.labels.names)
        errors = [
            {
                **{key: record[key] for key in ("where", "id") if record.get(key) is not None},
                "text": marked_text(record),
                "expected": expected,
                "predicted": predicted,
                "probability": prediction["probability"][predicted],
            }
            for (record, prediction), expected, predicted in zip(pairs, true, given, strict=True)
            if expected != predicted
        ]
        errors.sort(key=lambda error: -float(error["probability"]))
        tables = (table, Table("labels", each.columns, each.rows))
        return Report(metrics, tables, self.labels.names, confusion.tolist(), tuple(errors[:LISTED_ERRORS]))


def marked_text(record: Record) -> str:
    """The sentence with its two entities marked, for people."""
    words = [str(word) for word in record["tokens"]]
    for name, (opening, closing) in (("head", MARKERS[:2]), ("tail", MARKERS[2:])):
        first, last = record[name]
        words[first] = f"{opening} {words[first]}"
        words[last - 1] = f"{words[last - 1]} {closing}"
    return " ".join(words)
