"""The engine: forward under the right precision, backward that accumulates sums, one step that normalises once.

It composes the rooms below and contains no feature of its own. Because losses arrive as sums and counts and are divided
once per optimizer step by the number of tokens of *all* micro-batches, gradient accumulation and packing cannot change
the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainwright.base.protocols import StateDict
from trainwright.engine.precision import Precision
from trainwright.models import Decoder
from trainwright.optim import EMA, GroupedOptimizer, clip_factor, gradient_norm

__all__ = ["Engine", "LossSum", "StepReport"]

Guard = Callable[[float, float], bool]
"""Given the mean loss and the gradient norm of a step, says whether the step may be taken."""


class LossSum(Protocol):
    """What a task hands to `Engine.backward`: the loss summed over `count` trained tokens."""

    @property
    def loss_sum(self) -> Tensor: ...

    @property
    def count(self) -> Tensor: ...


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        loss: scalar, mean over the step's trained tokens, nats.
        grad_norm: scalar, global L2 norm of the mean gradient before clipping.
        tokens: trained tokens in the step.
        lr: learning rate of the first parameter group that the step used.
        skipped: the guard refused the step; parameters and optimizer state are unchanged.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor
    lr: float
    skipped: bool


class Engine:
    """Holds a model, its optimizer and what happens between them.

    Args:
        model: parameters already on their device and in `precision.parameter_dtype`.
        optimizer: from `build_optimizer`; its groups hold the rates at multiplier 1.
        multiplier: pure function of the step (0-based) giving the learning-rate multiplier.
        precision: the policy under which the forward pass runs.
        clip_norm: largest global gradient norm; None measures the norm without clipping.
        ema: optional moving average of the parameters, updated after every step that is taken.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: GroupedOptimizer,
        *,
        multiplier: Callable[[int], float],
        precision: Precision,
        clip_norm: float | None = None,
        ema: EMA | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.multiplier = multiplier
        self.precision = precision
        self.clip_norm = clip_norm
        self.ema = ema
        self.steps = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._loss_sum = torch.zeros((), device=self._device)
        self._count = torch.zeros((), dtype=torch.int64, device=self._device)

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes, in training and in evaluation."""
        return self.precision.autocast(self._device.type)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the moving average of its weights, where there is one; afterwards its own again."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def backward(self, output: LossSum) -> None:
        """Add this micro-batch's gradient of the loss *sum* to the step's gradient."""
        output.loss_sum.backward()
        self._loss_sum += output.loss_sum.detach()
        self._count += output.count

    def poison(self) -> None:
        """Make this step's gradient NaN: what the fault action `nan` rehearses."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)

    def step(self, guard: Guard | None = None) -> StepReport:
        """Divide by the step's token count, clip, update the parameters and start the next step with no gradient.

        `guard` sees the loss and the gradient norm on the host, which waits for the device; without it nothing waits.
        """
        count = self._count.clamp(min=1)
        loss = self._loss_sum / count
        norm_of_sum = gradient_norm(self._parameters)
        grad_norm = norm_of_sum / count
        taken = guard is None or guard(float(loss), float(grad_norm))
        self.optimizer.set_lr(self.multiplier(self.steps))
        lr = float(self.optimizer.param_groups[0]["lr"])
        if taken:
            # Dividing by the count and clipping are one factor, folded into the optimizer's pass over the gradients.
            self.optimizer.step(gradient_factor=clip_factor(norm_of_sum, self.clip_norm, scale=1.0 / count))
            if self.ema is not None:
                self.ema.update()
        report = StepReport(loss, grad_norm, self._count.clone(), lr, skipped=not taken)
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self._count = torch.zeros_like(self._count)
        self.steps += 1
        return report

    def state_dict(self) -> StateDict:
        """Everything a resumed run needs of this engine: weights, optimizer state, moving average, step count."""
        state: StateDict = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of `state_dict`; the moving average must be on or off in both."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
