"""Embeddings: a vector for every text, near to those of the texts that belong to it.

Records have an anchor, a positive and, where wanted, negatives. All texts of a micro-batch go through the model in one
forward pass. The scope of in-batch negatives is stated, since it changes the loss: the positives of this micro-batch on
this rank, and with `task.group` set those of the same micro-batch on all ranks of that group. Accumulation never adds
negatives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainwright.base.errors import DataError
from trainwright.data.examples.example import IGNORE, Encoded, Example, ExampleEncoder, Feature
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.embedding_noise import SECOND_PASS
from trainwright.models.heads import HeadSpec
from trainwright.tasks.contrastive import NO_TEXT, Texts, contrastive_loss, gathered
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, Frame, frame_of
from trainwright.tasks.labelled_loss import auxiliary
from trainwright.tasks.pair_encoder import shorter_text
from trainwright.tasks.task import LISTED_ERRORS, Batch, LossOutput, Metric, Report, Table
from trainwright.tasks.text_metrics.retrieval import retrieval_scores

__all__ = ["AnchorEncoder", "Embedding", "EmbeddingDefinition"]

_VERSION = 1


class EmbeddingDefinition:
    """Embeddings as a recipe says it; see `TaskDefinition`. `max_length` counts the tokens of one text."""

    name = "embedding"
    shape = "anchors"

    def __init__(self, section: Any, max_length: int) -> None:
        self.section = section
        self.max_length = max_length
        self.special_tokens: tuple[str, ...] = ENCODER_TOKENS if section.frame == "encoder" else ()

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Nothing needs to be known of the records."""
        return {}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> Embedding:
        """Raises ConfigError where an encoder's frame is wanted of a tokenizer without [CLS] and [SEP]."""
        return Embedding(self.section, AnchorEncoder(tokenizer, self.section, self.max_length))


class AnchorEncoder:
    """The texts of a record side by side: the anchor as input_ids, the others as targets with lengths of their own.

    Further features: `text_lengths` [1 + negatives] of the others; `text_keys` [2 + negatives], a number that equal
    texts share, 0 where there is no text; `labels`, 0 where a positive is, else not trained.
    """

    packable = False

    def __init__(self, tokenizer: Tokenizer, section: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.frame: Frame = frame_of(tokenizer, section.frame)
        self.negatives: int = section.negatives
        self.prefixes = (section.query_prefix or "", section.passage_prefix or "")
        others = (Feature(name, "int32", "target") for name in other_names(self.negatives))
        self.features: tuple[Feature, ...] = (
            Feature("input_ids", "int32", "tokens"),
            *others,
            Feature("text_lengths", "int64", "row", shape=(1 + self.negatives,)),
            Feature("text_keys", "int64", "row", shape=(2 + self.negatives,)),
            Feature("labels", "int64", "row", pad=IGNORE),
        )
        facts = [_VERSION, section.frame, self.negatives, self.prefixes, max_length]
        self.fingerprint = json.dumps(["anchors", *facts], ensure_ascii=False)

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Raises DataError for a record without an anchor, or with fewer negatives than are to be used."""
        anchor, positive = record.get("anchor"), record.get("positive")
        negatives = list(record.get("negatives") or ())[: self.negatives]
        if not isinstance(anchor, str) or not anchor.strip():
            raise DataError("a record has no anchor", hint="expected the columns anchor and positive")
        if positive is not None and len(negatives) < self.negatives:
            raise DataError(
                f"a record has {len(negatives)} negatives; task.negatives asks for {self.negatives}",
                hint="lower task.negatives, or give every record as many",
            )
        negatives += [None] * (self.negatives - len(negatives))
        texts = [self.prefixes[0] + anchor, *(self._passage(text) for text in (positive, *negatives))]
        rows, cuts = zip(*(self._row(text) for text in texts), strict=True)
        arrays = {"input_ids": rows[0], **dict(zip(other_names(self.negatives), rows[1:], strict=True))}
        example = {name: np.array(row, dtype=np.int32) for name, row in arrays.items()}
        example["text_lengths"] = np.array([len(row) for row in rows[1:]], dtype=np.int64)
        example["text_keys"] = np.array([_key(text) for text in texts], dtype=np.int64)
        example["labels"] = np.array(0 if positive is not None else IGNORE, dtype=np.int64)
        return Encoded((Example(example),), cut_tokens=sum(cuts))

    def _passage(self, text: Any) -> str | None:
        return self.prefixes[1] + text if isinstance(text, str) and text.strip() else None

    def _row(self, text: str | None) -> tuple[list[int], int]:
        """Tokens of a text in its frame, and how many were cut; one token stands for no text."""
        if text is None:
            return [self.tokenizer.pad_id or 0], 0
        shown, _, cut = shorter_text(text.strip(), lambda part: len(self._framed(part)), self.max_length)
        return self._framed(shown)[: self.max_length], cut

    def _framed(self, text: str) -> list[int]:
        """A decoder's frame ends with the end token: its vector has read the whole text."""
        ids = self.frame.single(self.tokenizer.encode(text, parse_special=False))
        if self.frame.one.after or self.tokenizer.eos_id is None:
            return ids
        return [*ids, self.tokenizer.eos_id]


def other_names(negatives: int) -> list[str]:
    """Names of the features beside the anchor's."""
    return ["positive_ids", *(f"negative{number}_ids" for number in range(negatives))]


def _key(text: str | None) -> int:
    if text is None:
        return NO_TEXT
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) | 1


class Embedding:
    """Vectors of texts by contrast. See `ExampleTask`.

    Attributes:
        group: process group of the data-parallel ranks whose positives are negatives too; None: this rank's alone.
            Whoever builds the task sets it where the recipe's `gather` is on; validation stays with each batch.
    """

    name = "embedding"
    best = Metric("recall@1", higher=True)

    def __init__(self, section: Any, encoder: AnchorEncoder) -> None:
        self.section = section
        self.encoder: ExampleEncoder = encoder
        self.negatives = encoder.negatives
        self.tokenizer = encoder.tokenizer
        self.head: HeadSpec | None = HeadSpec("embedding", pooling=section.pooling, dropout=0.0)
        self.group: Any = None

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """InfoNCE in nats, summed over the anchors of this micro-batch (arXiv 1807.03748)."""
        vectors = self._vectors(model, batch)
        loss_sum, count = self._contrast(vectors, batch, self.group if self.section.gather else None)
        known = (batch["labels"] != IGNORE).repeat(len(vectors))
        added = auxiliary(model, known, _width(batch, self.negatives))
        return LossOutput(loss_sum + added / len(vectors), count)

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The same with the negatives of this batch alone; `outputs`: the vectors of anchors and positives [B, D]."""
        vectors = self._vectors(model, batch)
        loss_sum, count = self._contrast(vectors, batch, None)
        return LossOutput(loss_sum, count, {"anchor": vectors[0], "positive": vectors[1]})

    def _vectors(self, model: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Vectors [B, D] of anchors, positives and negatives, in one forward pass."""
        names = ["input_ids", *other_names(self.negatives)]
        width = _width(batch, self.negatives)
        ids = [torch.nn.functional.pad(batch[name], (0, width - batch[name].shape[1])) for name in names]
        lengths = torch.cat((batch["lengths"], *batch["text_lengths"].unbind(1)))
        order = torch.arange(width, device=lengths.device)
        place = getattr(model, "dropout_place", None)
        if place is not None and place.rows is not None:  # texts of one record are dropped differently
            rows = torch.cat([place.rows + SECOND_PASS * number for number in range(len(names))])
            model.set_dropout(seed=place.seed, rows=rows)
        stacked = {"input_ids": torch.cat(ids), "lengths": lengths, "key_mask": order[None] < lengths[:, None]}
        scores: Tensor = model.scores(stacked)
        return scores.chunk(len(names))

    def _contrast(self, vectors: Sequence[Tensor], batch: Batch, group: Any) -> tuple[Tensor, Tensor]:
        usable = batch["labels"] != IGNORE
        keys = torch.where(usable[:, None], batch["text_keys"], NO_TEXT).unbind(1)
        anchors, positives, *negatives = (Texts(v, k) for v, k in zip(vectors, keys, strict=True))
        place, others = 0, anchors
        pools = [positives, *negatives]
        if group is not None:
            _, place = gathered(positives, group)
            pools = [gathered(texts, group)[0] for texts in pools]
            others = gathered(anchors, group)[0] if self.section.symmetric else anchors
        candidates = Texts(torch.cat([pool.vectors for pool in pools]), torch.cat([pool.keys for pool in pools]))
        return contrastive_loss(
            anchors,
            positives,
            candidates,
            place=place,
            temperature=self.section.temperature,
            other_anchors=others if self.section.symmetric else None,
        )

    # ---- what it gives

    def predict(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """{"anchor": vector} of each record, and "positive" where it has one: lists of numbers, length 1."""
        found: list[Mapping[str, Any]] = []
        for record, output in zip(records, outputs, strict=True):
            names = ("anchor", "positive") if record.get("positive") is not None else ("anchor",)
            found.append({name: [float(x) for x in output[name][0]] for name in names})
        return found

    def report(self, records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """Search every different anchor among all different positives of the records: recall, MRR and nDCG.

        Raises DataError where no record has a positive.
        """
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if r.get("positive") is not None]
        if not pairs:
            raise DataError("no record has a positive to find", hint="give pairs, or use `predict`, which needs none")
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}
        relevant: list[set[int]] = []
        vectors: dict[str, list[Any]] = {"anchor": [], "positive": []}
        for record, prediction in pairs:
            query, document = record["anchor"].strip(), record["positive"].strip()
            if query not in queries:
                queries[query] = len(queries)
                relevant.append(set())
                vectors["anchor"].append(prediction["anchor"])
            if document not in documents:
                documents[document] = len(documents)
                vectors["positive"].append(prediction["positive"])
            relevant[queries[query]].add(documents[document])
        metrics, first = retrieval_scores(
            np.array(vectors["anchor"], dtype=np.float32), np.array(vectors["positive"], dtype=np.float32), relevant
        )
        texts = list(documents)
        errors = [
            {"text": query, "expected": texts[min(relevant[n])], "predicted": texts[first[n][0]]}
            for query, n in queries.items()
            if int(first[n][0]) not in relevant[n]
        ]
        note = f"{len(queries)} queries, every one searched among {len(documents)} texts; cosine similarity"
        table = Table("Retrieval", tuple(metrics), (tuple(metrics.values()),), (note,))
        return Report(metrics=metrics, tables=(table,), errors=tuple(errors[:LISTED_ERRORS]))


def _width(batch: Batch, negatives: int) -> int:
    return max(batch[name].shape[1] for name in ("input_ids", *other_names(negatives)))
