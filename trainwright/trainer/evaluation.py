"""Validation: the mean loss over rows that no training step sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.engine import Engine
from trainwright.tasks import Task

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass.

    Attributes:
        loss: mean cross-entropy per token, nats.
        tokens: how many tokens it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(engine: Engine, task: Task, batches: Iterable[Mapping[str, Tensor]]) -> Evaluation:
    """Mean loss over all trained tokens of `batches`, with the moving average of the weights where there is one.

    Every rank calls it with its share of the batches; all get the same result. Sums are kept in float64, so it does not
    depend on how rows are grouped beyond the forward pass itself.
    """
    model = engine.model
    loss_sum, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with engine.averaged():
            for batch in batches:
                of_batch = engine.evaluate(task.evaluate, batch)
                loss_sum += of_batch[0]
                count += of_batch[1]
    finally:
        model.train(was_training)
    sums = engine.ranks.sum_(torch.tensor([loss_sum, count], dtype=torch.float64))
    loss_sum, count = float(sums[0]), int(sums[1])
    return Evaluation(loss=loss_sum / count if count else math.nan, tokens=count)
