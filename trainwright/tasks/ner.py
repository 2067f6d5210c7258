"""Named entities: a tag for every word, through the tokens that the words are made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks.labelled import NERSection
from trainwright.data.examples.example import IGNORE, Encoded, Example, ExampleEncoder, Feature, Piece
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, Frame, WordPieces, frame_of, spaces_before
from trainwright.tasks.labelled_loss import class_losses
from trainwright.tasks.labelled_tags import best_allowed, tag_names, write_tags
from trainwright.tasks.labelled_windows import windows_of
from trainwright.tasks.labels import LabelNames, place_of
from trainwright.tasks.metrics.entities import Entity, entities, entity_scores
from trainwright.tasks.ner_report import entity_errors, type_confusion
from trainwright.tasks.task import PREDICT_INSTEAD, Batch, LossOutput, Metric, Record, Report

__all__ = ["NER", "NERDefinition", "TagEncoder"]


@dataclass(frozen=True)
class NERDefinition:
    """Named entities as the recipe says it; `max_length` counts the tokens of a row."""

    section: NERSection
    max_length: int
    name = "ner"
    shape = "tagged"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer that is trained for this task must have."""
        return ENCODER_TOKENS if self.section.frame == "encoder" else ()

    def survey(self, records: Iterable[Record]) -> dict[str, Any]:
        """The types of entities and how often each comes. Raises DataError where words and tags differ in number."""
        counts: Counter[str] = Counter()
        tagged = 0
        for record in records:
            if record.get("tags") is not None:
                tagged += 1
                counts.update(kind for kind, _, _ in _entities(record))
        if not tagged:
            raise DataError("no training record has tags", hint="name the column: data.columns: {tags: NAME}")
        return {"counts": dict(counts), "records": tagged}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> NER:
        """The task for these types. Raises ConfigError where rows are too short."""
        section = self.section
        unseen = section.unseen_as
        types = LabelNames.of_training(
            survey["counts"],
            section.labels,
            unseen_as=None if unseen == "O" else unseen,
            what="type of entity",
        )
        frame = frame_of(tokenizer, section.frame)
        room = self.max_length - frame.one.size
        if room < 2:
            raise ConfigError(
                f"data.sequence_length is {self.max_length}, and {frame.one.size} tokens stand around a text"
            )
        label_on = section.label_on
        if label_on == "auto":
            label_on = "first" if frame.encoder else "last"
        overlap = room // 4 if section.overlap == "auto" else section.overlap
        encoder = TagEncoder(
            tokenizer,
            frame,
            types,
            section.scheme,
            self.max_length,
            overlap=min(overlap, room - 1),
            label_on=label_on,
            unseen_is_none=unseen == "O",
        )
        return NER(section, types, encoder)


def _entities(record: Record) -> list[Entity]:
    """What the record's tags say; sequences that no scheme allows are read as conlleval reads them."""
    tags = record["tags"]
    if len(tags) != len(record["tokens"]):
        raise DataError(
            f"{place_of(record)}{len(tags)} tags for {len(record['tokens'])} words; expected one for each",
            hint="mend the record, or look at data.columns",
        )
    return entities(tags)


class TagEncoder:
    """Rows of words, several where a sentence is too long. Pure, and can be pickled."""

    packable = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        frame: Frame,
        types: LabelNames,
        scheme: str,
        max_length: int,
        *,
        overlap: int,
        label_on: str,
        unseen_is_none: bool = False,
    ) -> None:
        self.frame = frame
        self.types = types
        self.scheme = scheme
        self.max_length = max_length
        self.overlap = overlap
        self.label_on = label_on
        self.unseen_is_none = unseen_is_none
        self.tags = tuple(tag_names(types.names, scheme))
        self._index = {tag: index for index, tag in enumerate(self.tags)}
        self._pieces = WordPieces(tokenizer)
        pad = tokenizer.pad_id
        self.features: tuple[Feature, ...] = (
            Feature("input_ids", "int32", "tokens", 0 if pad is None else pad),
            Feature("labels", "int64", "tokens", IGNORE),
            Feature("word_mask", "int32", "tokens", 0),
            Feature("edges", "int32", "row", 0, (2,)),
        )
        facts = ["ner", 1, self.tags, types.unseen_as, unseen_is_none, max_length, overlap, label_on, repr(frame)]
        self.fingerprint = json.dumps(facts, ensure_ascii=False)

    def encode(self, record: Record) -> Encoded:
        """Rows with the tags of the words that each answers for. Raises DataError for a type that training has not."""
        words = record["tokens"]
        if not words:
            return Encoded(dropped="there are no words")
        tags = self._tags(record)
        pieces = [self._pieces.ids(word, spaced) for word, spaced in zip(words, _spaced(record), strict=True)]
        room = self.max_length - self.frame.one.size
        windows = windows_of([len(piece) for piece in pieces], room, self.overlap)
        examples = []
        for number, window in enumerate(windows):
            facts = {"first": window.first, "own": [window.own_first, window.own_last]}
            arrays = self._row(pieces, tags, window.first, window.last, (window.own_first, window.own_last), room)
            arrays["edges"] = np.array([window.first == 0, window.last == len(words)], dtype=np.int32)
            examples.append(Example(arrays, Piece(number, len(windows), facts)))
        return Encoded(tuple(examples), cut_tokens=sum(max(0, len(piece) - room) for piece in pieces))

    def _tags(self, record: Record) -> list[str] | None:
        """The tags that the model learns; None where the record has none."""
        if record.get("tags") is None:
            return None
        known = []
        for kind, first, last in _entities(record):
            if self.unseen_is_none and kind not in self.types.names:
                continue
            known.append((self.types.known(kind), first, last))
        return write_tags(known, len(record["tokens"]), self.scheme)

    def _row(
        self,
        pieces: Sequence[list[int]],
        tags: Sequence[str] | None,
        first: int,
        last: int,
        own: tuple[int, int],
        room: int,
    ) -> dict[str, Any]:
        """Arrays of the words [first, last); words outside `own` are read, but neither trained nor answered for."""
        ids, labels, mask = [], [], []
        for word in range(first, last):
            piece = pieces[word][:room]
            place = len(piece) - 1 if self.label_on == "last" else 0
            of_word = [IGNORE] * len(piece)
            if tags is not None and own[0] <= word < own[1]:
                of_word[place] = self._index[tags[word]]
                if self.label_on == "all":
                    of_word[1:] = [self._index[_going_on(tags[word])]] * (len(piece) - 1)
            ids += piece
            labels += of_word
            mask += [int(index == place) for index in range(len(piece))]
        before, after = len(self.frame.one.before), len(self.frame.one.after)
        return {
            "input_ids": np.asarray(self.frame.single(ids), dtype=np.int32),
            "labels": np.asarray([IGNORE] * before + labels + [IGNORE] * after, dtype=np.int64),
            "word_mask": np.asarray([0] * before + mask + [0] * after, dtype=np.int32),
        }


def _going_on(tag: str) -> str:
    """What the further tokens of a word have in the scheme "bio": the word's entity goes on in them."""
    return f"I{tag[1:]}" if tag.startswith("B-") else tag


def _spaced(record: Record) -> list[bool]:
    """Whether a space stands before each word: as in its text where that is kept, else by the kind of characters."""
    offsets = record.get("offsets")
    if offsets is None:
        return spaces_before(record["tokens"])
    return [bool(i and start > offsets[i - 1][1]) for i, (start, _) in enumerate(offsets)]


class NER:
    """Named entities of known types. Made by `NERDefinition.bind`."""

    name = "ner"
    best = Metric("f1", higher=True)

    def __init__(self, section: NERSection, types: LabelNames, encoder: TagEncoder) -> None:
        self.section = section
        self.types = types
        self.tags = encoder.tags
        self.encoder: ExampleEncoder = encoder
        self.head: HeadSpec | None = HeadSpec("token", self.tags, crf=section.crf, dropout=section.head_dropout)

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy summed over the labelled tokens; with a CRF that of whole sequences, counted by tokens too."""
        output = self._sums(model, model.scores(batch), batch, self.section.label_smoothing)
        added = model.auxiliary_loss(batch["labels"])
        return output if added is None else LossOutput(output.loss_sum + added, output.count)

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The plain loss, and the best tags [B, T] with the mask of the tokens that they are read at."""
        scores = model.scores(batch)
        sums = self._sums(model, scores, batch, 0.0)
        mask = batch["word_mask"] > 0
        if self.section.crf:
            tags = model.task_head.crf.decode(scores, mask)
        elif self.section.constrained:
            tags = best_allowed(scores, mask, self.tags, batch["edges"])
        else:
            tags = scores.argmax(-1)
        return LossOutput(sums.loss_sum, sums.count, {"tags": tags.to(torch.int32), "word_mask": mask})

    def _sums(self, model: Any, scores: Tensor, batch: Batch, smoothing: float) -> LossOutput:
        labels = batch["labels"]
        if self.section.crf:
            return LossOutput(*model.task_head.crf.loss_sum(scores, labels, None))
        return LossOutput(class_losses(scores, labels, smoothing=smoothing).sum(), (labels != IGNORE).sum())

    def predict(self, records: Sequence[Record], outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Each record's "tokens" with "tags" in IOB2, and its "entities" with their type, words and text."""
        return [self._prediction(record, output) for record, output in zip(records, outputs, strict=True)]

    def _prediction(self, record: Record, output: Mapping[str, Any]) -> dict[str, Any]:
        words = record["tokens"]
        tags = ["O"] * len(words)
        for piece, found, mask in zip(output["pieces"], output["tags"], output["word_mask"], strict=True):
            read = [self.tags[tag] for tag in found[np.asarray(mask, dtype=bool)].tolist()]
            own_first, own_last = piece.facts["own"]
            start = own_first - piece.facts["first"]
            tags[own_first:own_last] = read[start : start + own_last - own_first]
        spans = entities(tags)
        kept = {key: record[key] for key in ("id", "text", "offsets") if record.get(key) is not None}
        return {
            **kept,
            "tokens": list(words),
            "tags": write_tags(spans, len(words)),
            "entities": [
                {"type": kind, "start": first, "end": last + 1, "text": _text_of(record, first, last)}
                for kind, first, last in spans
            ],
        }

    def report(self, records: Sequence[Record], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """Precision, recall and F1 of whole entities, as conlleval and seqeval count them; errors by kind.

        Raises:
            DataError: no record has tags.
        """
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if r.get("tags") is not None]
        if not pairs:
            raise DataError("no record has tags to compare predictions with", hint=PREDICT_INSTEAD)
        true = [write_tags(_entities(record), len(record["tokens"])) for record, _ in pairs]
        given = [list(prediction["tags"]) for _, prediction in pairs]
        metrics, table = entity_scores(true, given)
        errors, kinds = entity_errors([record for record, _ in pairs], true, given)
        names, confusion = type_confusion(true, given)
        return Report(metrics, (table, kinds), names, confusion, errors)


def _text_of(record: Record, first: int, last: int) -> str:
    """The words [first, last] as they stand in a text."""
    offsets, text = record.get("offsets"), record.get("text")
    if offsets is not None and isinstance(text, str):
        return text[offsets[first][0] : offsets[last][1]]
    words = record["tokens"][first : last + 1]
    return "".join(f" {word}" if spaced else word for word, spaced in zip(words, spaces_before(words), strict=True))
