"""Causal language modelling: predict the next token. The loss comes back as a sum and a count, never as a mean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainwright.models.backbone import Backbone
from trainwright.models.heads import HeadSpec
from trainwright.tasks.task import LossOutput, Metric

__all__ = ["CausalLM"]


class CausalLM:
    """Next-token prediction over `labels` [batch, sequence] (already aligned with the inputs; -100 is not trained).

    Args:
        label_smoothing: share of the target mass spread evenly over the vocabulary, 0 <= value < 1.
        z_loss: weight of `logsumexp(logits)**2`, which keeps logits from drifting (PaLM, arXiv 2204.02311, used 1e-4).
        compiled: compile the statistics of the loss, as the blocks of the model are.
    """

    name = "causal_lm"
    best = Metric()
    head: HeadSpec | None = None

    def __init__(self, *, label_smoothing: float = 0.0, z_loss: float = 0.0, compiled: bool = False) -> None:
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.compiled = compiled

    def loss(self, model: Backbone, batch: Mapping[str, Tensor]) -> LossOutput:
        """The training objective: cross-entropy in nats, with label smoothing and z-loss where they are on, and what
        the model itself adds (the auxiliary loss of experts)."""
        output = self._sums(model, batch, self.label_smoothing, self.z_loss)
        added = model.auxiliary_loss(batch["labels"])
        return output if added is None else LossOutput(output.loss_sum + added, output.count)

    def evaluate(self, model: Backbone, batch: Mapping[str, Tensor]) -> LossOutput:
        """Plain cross-entropy in nats, whatever the training objective adds to it."""
        return self._sums(model, batch, 0.0, 0.0)

    def _sums(self, model: Backbone, batch: Mapping[str, Tensor], label_smoothing: float, z_loss: float) -> LossOutput:
        hidden = model.hidden_states(
            batch["input_ids"], position_ids=batch.get("position_ids"), document_ids=batch.get("document_ids")
        )
        sums = model.head_loss(
            hidden.flatten(0, 1),
            batch["labels"].flatten(),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=self.compiled,
        )
        return LossOutput(loss_sum=sums.loss_sum, count=sums.count)
