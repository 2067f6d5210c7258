"""Extractive question answering: the span of a text that answers a question, or that none does (SQuAD 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks.labelled import QASection
from trainwright.data.examples.example import IGNORE, ExampleEncoder
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.labelled_frame import ENCODER_TOKENS, frame_of
from trainwright.tasks.labelled_loss import auxiliary, class_losses
from trainwright.tasks.qa_encoder import SpanEncoder
from trainwright.tasks.qa_report import answer_report
from trainwright.tasks.task import PREDICT_INSTEAD, Batch, LossOutput, Metric, Record, Report

__all__ = ["QA", "QADefinition", "official_predictions"]

LEAST_TEXT = 8
"""Tokens of the text that a row must hold beside the longest question."""
BLOCKED = -1e4
"""Score of a token that no answer may begin or end with; finite, so that sums of scores stay numbers."""


@dataclass(frozen=True)
class QADefinition:
    """Question answering as the recipe says it; `max_length` counts the tokens of a row."""

    section: QASection
    max_length: int
    name = "qa"
    shape = "qa"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer that is trained for this task must have."""
        return ENCODER_TOKENS if self.section.frame == "encoder" else ()

    def survey(self, records: Iterable[Record]) -> dict[str, Any]:
        """How many questions have an answer, and how many have none. Raises DataError where nothing is known of any."""
        answered = impossible = 0
        for record in records:
            if record.get("answers") is not None:
                has = bool(record["answers"]["text"])
                answered += has
                impossible += not has
        if not answered + impossible:
            raise DataError("no training question has an answer", hint="name the column: data.columns: {answers: NAME}")
        return {"answered": answered, "impossible": impossible}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> QA:
        """The task. Raises ConfigError where rows hold no text beside a question."""
        section = self.section
        frame = frame_of(tokenizer, section.frame)
        encoder = SpanEncoder(
            tokenizer,
            frame,
            self.max_length,
            max_question=section.max_question,
            doc_stride=None if section.doc_stride == "auto" else section.doc_stride,
        )
        if encoder.smallest_room < LEAST_TEXT:
            raise ConfigError(
                f"data.sequence_length is {self.max_length}: beside a question of {section.max_question} tokens "
                f"{encoder.smallest_room} are left for the text",
                hint="raise data.sequence_length, or lower task.max_question",
            )
        return QA(section, encoder, impossible=int(survey["impossible"]) > 0)


class QA:
    """Question answering. Made by `QADefinition.bind`."""

    name = "qa"
    best = Metric("f1", higher=True)

    def __init__(self, section: QASection, encoder: SpanEncoder, *, impossible: bool) -> None:
        self.section = section
        self.impossible = impossible
        self.spans = encoder
        self.encoder: ExampleEncoder = encoder
        self.head: HeadSpec | None = HeadSpec("span", ("start", "end"), dropout=section.head_dropout)

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The mean of the cross-entropies of start and end, summed over the windows whose answer is known.

        Only tokens of the text, and the place that stands for no answer, are candidates.
        """
        scores = self._scores(model, batch)
        losses = self._losses(scores, batch, self.section.label_smoothing)
        known = self._known(batch)
        added = auxiliary(model, known, batch["input_ids"].shape[1])
        return LossOutput(losses.sum() + added, known.sum())

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The plain loss, and of every window the best starts and ends with their scores, and the score of no answer.

        "starts", "ends" [B, n] are places of tokens; "start_scores", "end_scores" [B, n]; "null_score" [B].
        """
        scores = self._scores(model, batch)
        losses = self._losses(scores, batch, 0.0)
        null = scores.gather(1, batch["null_place"][:, None, None].expand(-1, -1, 2)).sum((1, 2))
        texts = torch.where((batch["answerable"] == 1)[..., None], scores, BLOCKED)
        best, places = texts.topk(min(self.section.n_best, texts.shape[1]), dim=1)
        outputs = {
            "starts": places[..., 0],
            "ends": places[..., 1],
            "start_scores": best[..., 0],
            "end_scores": best[..., 1],
            "null_score": null,
        }
        return LossOutput(losses.sum(), self._known(batch).sum(), outputs)

    def _scores(self, model: Any, batch: Batch) -> Tensor:
        """Scores [B, T, 2] of starts and ends; what is no candidate is blocked."""
        scores = model.scores(batch).float()
        return torch.where((batch["answerable"] > 0)[..., None], scores, BLOCKED)

    def _losses(self, scores: Tensor, batch: Batch, smoothing: float) -> Tensor:
        labels = batch["labels"]  # [B, 2]
        losses = class_losses(scores.transpose(1, 2), labels)
        if smoothing:  # over the candidates alone
            candidates = batch["answerable"] > 0
            log_probs = scores.log_softmax(1) * candidates[..., None]
            spread = -(log_probs.sum(1) / candidates.sum(1, keepdim=True).clamp(min=1))
            losses = torch.where(labels != IGNORE, (1 - smoothing) * losses + smoothing * spread, 0.0)
        return 0.5 * losses.sum(1)

    def _known(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORE).all(1)

    # --- predictions ---

    def predict(self, records: Sequence[Record], outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Each question with its "prediction_text" ("" for no answer), the same as "answers" with its place,
        "null_score" (how much more no answer scores than the best text) and "n_best" texts with probabilities."""
        return [self._prediction(record, output) for record, output in zip(records, outputs, strict=True)]

    def _prediction(self, record: Record, output: Mapping[str, Any]) -> dict[str, Any]:
        found = self._candidates(record, output)
        null = min(float(score) for score in output["null_score"])
        gap = null - found[0][0] if found else float("inf")
        none = not found or (self.impossible and gap > self.section.null_threshold)
        text, start = ("", None) if none else (found[0][1], found[0][2])
        # a question's best texts and "no answer" share one distribution, as in BERT's predictions
        scores = torch.tensor(
            [score for score, _, _ in found] + ([null] if self.impossible else []), dtype=torch.float64
        )
        shares = scores.softmax(0).tolist() if len(scores) else []
        return {
            **{key: record[key] for key in ("id", "question") if record.get(key) is not None},
            "prediction_text": text,
            "answers": {"text": [] if none else [text], "answer_start": [] if start is None else [start]},
            "is_impossible": none,
            "null_score": gap if found else None,
            "n_best": [
                {"text": text, "answer_start": start, "score": score, "probability": share}
                for (score, text, start), share in zip(found, shares, strict=False)
            ],
        }

    def _candidates(self, record: Record, output: Mapping[str, Any]) -> list[tuple[float, str, int]]:
        """(score, text, first character) of the best texts over all windows, best first; each text once."""
        context = record["context"]
        offsets = self.spans.offsets(context)
        pairs: list[tuple[float, int, int]] = []
        windows = (output[name] for name in ("pieces", "starts", "ends", "start_scores", "end_scores"))
        for piece, starts, ends, start_scores, end_scores in zip(*windows, strict=True):
            shift = piece.facts["first"] - piece.facts["at"]
            pairs += [
                (start_score + end_score, start + shift, end + shift)
                for start, start_score in zip(starts.tolist(), start_scores.tolist(), strict=True)
                for end, end_score in zip(ends.tolist(), end_scores.tolist(), strict=True)
                if start_score > BLOCKED and end_score > BLOCKED and 0 <= end - start < self.section.max_answer
            ]
        pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
        found: dict[str, tuple[float, str, int]] = {}
        for score, start, end in pairs:
            first, last = self.spans.characters(context, offsets, start, end)
            text = context[first:last]
            if text:
                found.setdefault(text, (score, text, first))
            if len(found) == self.section.n_best:
                break
        return list(found.values())

    def report(self, records: Sequence[Record], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """Exact match and F1 in the official definition, of questions with and without an answer, beside a baseline.

        Raises:
            DataError: nothing is known of the answer of any record.
        """
        pairs = [(r, p) for r, p in zip(records, predictions, strict=True) if r.get("answers") is not None]
        if not pairs:
            raise DataError("no question has an answer to compare predictions with", hint=PREDICT_INSTEAD)
        return answer_report(pairs, scoring=self.section.scoring, threshold=self.section.null_threshold)


def official_predictions(predictions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Question id to text, the form that the official evaluation scripts of SQuAD and CMRC 2018 read."""
    return {str(prediction["id"]): str(prediction["prediction_text"]) for prediction in predictions}
