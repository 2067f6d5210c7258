"""The three calls of a loop of one's own over a pipeline: micro-batches wait until the last one of their step is there.

`engine(**batch)` takes a micro-batch and gives a loss that is not known yet; `engine.backward(loss)` of the step's last
micro-batch sends all of them through the pipeline, and fills the losses in. So the loop is the one that it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.engine.engine import Batch

__all__ = ["ModelLoss", "QueuedOutput", "QueuedSteps", "own_loss"]


@dataclass(frozen=True)
class QueuedOutput:
    """What the engine gives for a micro-batch that waits.

    Attributes:
        loss: scalar; NaN until the step's last backward, then the mean loss of the step's micro-batches, on every rank.
    """

    loss: Tensor


@dataclass(frozen=True)
class ModelLoss:
    """A Hugging Face model's own mean loss of one micro-batch, as a sum of one."""

    loss_sum: Tensor
    count: Tensor


def own_loss(model: Any, micro_batch: Batch) -> ModelLoss:
    """The loss that a Hugging Face causal language model computes of its labels, on the rank of the last part."""
    hidden = model.hidden_states()
    logits = model.get_output_embeddings()(hidden)
    loss = model.loss_function(logits=logits, labels=micro_batch["labels"], vocab_size=model.config.vocab_size)
    return ModelLoss(loss, torch.ones((), dtype=torch.int64, device=loss.device))


class QueuedSteps:
    """Micro-batches of one step that wait for the last."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device = device
        self._group = group
        self._waiting: list[tuple[Batch, Tensor]] = []
        self._taken: Tensor | None = None
        self._open = False

    def add(self, named: Batch) -> QueuedOutput:
        """Take a micro-batch.

        Raises:
            ConfigError: it has no ids or labels, or the one before it never came to `backward`.
        """
        missing = [key for key in ("input_ids", "labels") if key not in named]
        if self._open:
            raise ConfigError(
                "the micro-batch before never came to backward: over a pipeline all of a step run together",
                hint="call engine.backward(loss) after each engine(...), or engine.eval() before those without one",
            )
        if missing:
            raise ConfigError(
                f"a pipeline's micro-batch needs input_ids and labels by name, and has {sorted(named)}",
                hint="call engine(input_ids=..., labels=...): the last stage computes the loss",
            )
        loss = torch.full((), torch.nan, device=self._device)
        self._taken, self._open = loss, True
        self._waiting.append((named, loss))
        return QueuedOutput(loss)

    def holds(self, loss: Any) -> bool:
        """Whether this is the loss of the micro-batch that came last; if so, it has come to backward."""
        held = loss is self._taken
        self._open = self._open and not held
        return held

    def take(self) -> list[Batch]:
        """The micro-batches of the step."""
        return [micro_batch for micro_batch, _ in self._waiting]

    def fill(self, total: Tensor) -> None:
        """Tell the losses what the step's sum over its micro-batches was, on the rank that knows; zeros elsewhere."""
        mean = self.told(total / len(self._waiting)).loss
        for _, loss in self._waiting:
            loss.copy_(mean)
        self._waiting, self._taken = [], None

    def told(self, loss: Tensor) -> QueuedOutput:
        """What one rank of the pipeline knows, on all of them; zeros elsewhere."""
        known = loss.to(torch.float32)
        dist.all_reduce(known, group=self._group)
        return QueuedOutput(known)
