"""Validation: the mean loss over rows that no training step sees, and what the task's own metrics say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.base.text import did_you_mean
from trainwright.engine import Engine
from trainwright.tasks import LossOutput, Task
from trainwright.tasks.task import Metric, Report
from trainwright.trainer.outputs import Outputs

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass.

    Attributes:
        loss: mean loss per trained token (text, word), nats.
        tokens: how many of these it is the mean of.
        metrics: the task's own numbers by name; empty where it has none.
        report: the same in full, on the first rank; None elsewhere, and where the task has none.
    """

    loss: float
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    report: Report | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metric(self, name: str) -> float:
        """One of the metrics, or the loss.

        Raises:
            ConfigError: this task has no such metric.
        """
        if name == "loss":
            return self.loss
        if name not in self.metrics:
            known = ["loss", *self.metrics]
            raise ConfigError(
                f"no metric is called {name!r} here; there are {', '.join(known)}{did_you_mean(name, known)}"
            )
        return float(self.metrics[name])

    def worth(self, metric: Metric) -> float:
        """The metric as a number of which more is better."""
        value = self.metric(metric.name)
        return value if metric.higher else -value


def evaluate(
    engine: Engine, task: Task, batches: Iterable[Mapping[str, Tensor]], *, outputs: Outputs | None = None
) -> Evaluation:
    """Mean loss over all that is trained in `batches`, with the moving average of the weights where there is one.

    Every rank calls it with its share of the batches; all get the same result. Sums are kept in float64, so it does not
    depend on how rows are grouped beyond the forward pass itself.

    Args:
        outputs: keeps what the task's predictions are made of, of the rows that this rank computes.
    """
    model = engine.model
    loss_sum, count = 0.0, 0
    was_training = model.training
    model.eval()

    def judged(model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
        output = task.evaluate(model, batch)
        if outputs is not None and output.outputs is not None:
            outputs.keep(batch["rows"], output.outputs)
        return output

    try:
        with engine.averaged():
            for batch in batches:
                of_batch = engine.evaluate(judged, batch)
                loss_sum += of_batch[0]
                count += of_batch[1]
    finally:
        model.train(was_training)
    sums = engine.ranks.sum_(torch.tensor([loss_sum, count], dtype=torch.float64))
    loss_sum, count = float(sums[0]), int(sums[1])
    return Evaluation(loss=loss_sum / count if count else math.nan, tokens=count)
