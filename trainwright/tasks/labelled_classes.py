"""What tasks share that score classes of a whole row: the training objective, evaluation, and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.data.dataset import IGNORE
from trainwright.tasks.labelled_loss import (
    auxiliary,
    binary_distance,
    binary_losses,
    class_distance,
    class_losses,
    number_losses,
    twice,
)
from trainwright.tasks.task import Batch, LossOutput

__all__ = ["ClassObjective", "Problem", "probabilities"]

Problem = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class ClassObjective:
    """How scores [B, L] of a model become a loss.

    Args:
        weights: of the labels, in their order; None where all are 1.
        gamma, smoothing: see `class_losses`.
        r_drop: weight of the distance of two dropouts; the loss is then the mean of both passes plus this.
    """

    problem: Problem = "single_label"
    weights: tuple[float, ...] | None = None
    gamma: float = 0.0
    smoothing: float = 0.0
    r_drop: float = 0.0

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The training objective, summed over the labelled rows."""
        labels = batch["labels"]
        known, tokens = self._known(labels), batch["input_ids"].shape[1]
        if self.r_drop == 0.0:
            losses = self._losses(model.scores(batch), labels)
            return LossOutput(losses.sum() + auxiliary(model, known, tokens), known.sum())
        doubled = twice(model, batch)
        scores = model.scores(doubled)
        if len(scores) != 2 * len(labels):  # a part of a pipeline got the rows once from the part before
            raise ConfigError("task.r_drop reads rows twice, and this model cannot", hint="write task.r_drop: 0")
        losses = 0.5 * self._losses(scores, doubled["labels"]).sum()
        first, second = scores.chunk(2)
        apart = torch.where(known, self._distance(first, second), 0.0).sum()
        added = auxiliary(model, known.repeat(2), tokens)
        return LossOutput(losses + self.r_drop * apart + 0.5 * added, known.sum())

    def evaluate(self, model: Any, batch: Batch) -> LossOutput:
        """The plain loss, without weights and other additions, and the scores."""
        scores = model.scores(batch).float()
        labels = batch["labels"]
        losses = ClassObjective(self.problem)._losses(scores, labels)
        return LossOutput(losses.sum(), self._known(labels).sum(), {"scores": scores})

    def _known(self, labels: Tensor) -> Tensor:
        if self.problem == "single_label":
            return labels != IGNORE
        missing = labels.isnan()
        return ~(missing.any(-1) if self.problem == "multi_label" else missing)

    def _losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.problem == "regression":
            return number_losses(scores, labels)
        weights = None if self.weights is None else torch.tensor(self.weights, device=scores.device)
        if self.problem == "multi_label":
            return binary_losses(scores, labels, weights=weights, gamma=self.gamma)
        return class_losses(scores, labels, weights=weights, gamma=self.gamma, smoothing=self.smoothing)

    def _distance(self, first: Tensor, second: Tensor) -> Tensor:
        if self.problem == "single_label":
            return class_distance(first, second)
        if self.problem == "multi_label":
            return binary_distance(first, second)
        return (first.float() - second.float()).square().sum(-1)


def probabilities(scores: Any, problem: Problem) -> NDArray[np.float64]:
    """Probabilities [L] of the scores [L] of one row."""
    scores = np.asarray(scores, dtype=np.float64)
    if problem == "multi_label":
        return np.where(scores >= 0, 1 / (1 + np.exp(-np.abs(scores))), 1 - 1 / (1 + np.exp(-np.abs(scores))))
    powers = np.exp(scores - scores.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares
