"""The engine: forward under the right precision, backward that accumulates sums, one step that normalises once.

It composes the rooms below and contains no feature of its own. Because losses arrive as sums and counts and are divided
once per optimizer step by the number of tokens of *all* micro-batches of *all* ranks, gradient accumulation, packing
and data parallelism cannot change the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError
from trainwright.base.events import emit
from trainwright.base.protocols import StateDict
from trainwright.comm import ALONE
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.engine.precision import Precision
from trainwright.memory import PlacedState
from trainwright.optim import EMA, LossScaler, StepInBackward, clip_factor, norm_from, squared_norms
from trainwright.parallel import DataParallel, apply_zero

__all__ = ["Engine", "LossSum", "Optimizer", "StepReport"]

Guard = Callable[[float, float], bool]
"""Given the mean loss and the gradient norm of a step, says whether the step may be taken."""


class LossSum(Protocol):
    """What a task hands to `Engine.backward`: the loss summed over `count` trained tokens."""

    @property
    def loss_sum(self) -> Tensor: ...

    @property
    def count(self) -> Tensor: ...


class Optimizer(Protocol):
    """What the engine asks of an optimizer: ours, or a client's behind `ClientOptimizer`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self, closure: None = None, *, gradient_factor: float | Tensor | None = None) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def set_lr(self, multiplier: float) -> None: ...

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: StateDict) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; the same on every rank.

    Attributes:
        loss: scalar, mean over the step's trained tokens, nats.
        grad_norm: scalar, global L2 norm of the mean gradient before clipping.
        tokens: trained tokens in the step.
        lr: learning rate of the first parameter group that the step used.
        skipped: the step was not taken: the guard refused it, or the gradient overflowed.
        overflow: the gradient was not finite and the engine skips such steps; in fp16 the loss scale was lowered.
        loss_scale: what the loss was multiplied by before the backward pass; 1 without fp16.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor
    lr: float
    skipped: bool
    overflow: bool = False
    loss_scale: float = 1.0


class Engine:
    """Holds a model, its optimizer and what happens between them.

    Args:
        model: parameters already on their device and in `precision.parameter_dtype`, divided as `data_parallel` says.
        optimizer: from `build_optimizer`, its groups holding the rates at multiplier 1; None for evaluation only.
        multiplier: pure function of the step (0-based) giving the learning-rate multiplier.
        precision: the policy under which the forward pass runs.
        data_parallel: what `apply_zero` returned for `model`; None for a process on its own.
        accumulation: micro-batches of one optimizer step.
        clip_norm: largest global gradient norm; None measures the norm without clipping.
        ema: optional moving average of the parameters, updated after every step that is taken.
        scaler: the loss scale of fp16.
        skip_nonfinite: leave out steps whose gradient is not finite, as fp16 does; waits for the device.
        stepping: updates each parameter during the last backward pass of a step and frees its gradient.
        placed: where the optimizer's state lives, if not beside the parameters; held here as long as the engine.

    Attributes:
        steps: optimizer steps, those that were skipped included.
        skipped_steps: steps whose gradient overflowed; the learning-rate schedule does not count them.
        micro_steps: completed micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        multiplier: Callable[[int], float],
        precision: Precision,
        data_parallel: DataParallel | None = None,
        accumulation: int = 1,
        clip_norm: float | None = None,
        ema: EMA | None = None,
        scaler: LossScaler | None = None,
        skip_nonfinite: bool = False,
        stepping: StepInBackward | None = None,
        placed: PlacedState | None = None,
    ) -> None:
        if accumulation < 1:
            raise ConfigError(f"accumulation is {accumulation}, expected at least 1 micro-batch for a step")
        if precision.scales_loss != (scaler is not None):
            raise ConfigError(
                f"precision {precision.name} and a loss scaler belong together, and one of them is missing"
            )
        self.model: Any = model
        self.optimizer = optimizer
        self.multiplier = multiplier
        self.precision = precision
        self.data_parallel = data_parallel or apply_zero(model, make_mesh(Layout(1, 0, 1), ALONE))
        self.ranks = self.data_parallel.ranks
        self.accumulation = accumulation
        self.clip_norm = clip_norm
        self.ema = ema
        self.scaler = scaler
        self.skip_nonfinite = skip_nonfinite or scaler is not None
        self.stepping = stepping
        self.placed = placed
        self.steps = 0
        self.skipped_steps = 0
        self.micro_steps = 0
        self.last_report: StepReport | None = None
        groups = optimizer.param_groups if optimizer is not None else []
        self._parameters = [p for group in groups for p in group["params"]]
        trained = self._parameters or [p for p in model.parameters() if p.requires_grad]
        self._device = self.ranks.device if self.ranks.world > 1 or not trained else trained[0].device
        # Sums over a step, in fp64 so that they do not depend on how rows are dealt to micro-batches and ranks.
        wide = torch.float32 if self._device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=wide, device=self._device)
        self._count = torch.zeros((), dtype=wide, device=self._device)
        self._open = False
        self._held_back = 0
        self._forced: bool | None = None
        self._nominal: float | None = None

    # --- forward and backward ---

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass under the precision policy."""
        with self.autocast():
            return self.model(*inputs, **named)

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes, in training and in evaluation."""
        return self.precision.autocast(self._device.type)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the moving average of its weights, where there is one; afterwards its own again."""
        return self._averaged() if self.ema is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        assert self.ema is not None
        self.data_parallel.drop_gathered()
        with self.ema.applied():
            yield
            self.data_parallel.drop_gathered()

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-batch (begun by `backward`, else the coming one) is the last of its step."""
        if self._held_back:
            return False
        if self._forced is not None:
            return self._forced
        return (self.micro_steps + 1) % self.accumulation == 0

    def set_boundary(self, last: bool | None) -> None:
        """Say yourself whether the coming micro-batches end a step; None counts to `accumulation` again."""
        self._forced = last

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes only accumulate and no step is taken, at every stage."""
        self._held_back += 1
        try:
            yield
        finally:
            self._held_back -= 1

    def backward(self, output: LossSum | Tensor) -> Tensor:
        """Add this micro-batch's gradient to the step's; the last one of a step also sums over all ranks.

        Args:
            output: a loss sum with its count, which makes the step's gradient that of the mean over all tokens; or a
                scalar loss, usually a mean over the micro-batch: then the step's gradient is that of the mean over all
                micro-batches and ranks.

        Returns: the loss, detached.
        """
        if self._open:
            self.micro_steps += 1
        loss, count = _sum_and_count(output)
        last = self.at_boundary
        self._open = True
        if last and self.stepping is not None:
            self._arm(self.stepping, count)
        self.data_parallel.begin_backward(last=last)
        (loss if self.scaler is None else loss * self._loss_factor(count)).backward()
        self.data_parallel.end_backward(last=last)
        self._loss_sum += loss.detach()
        self._count += count
        return loss.detach()

    def _arm(self, stepping: StepInBackward, count: Tensor) -> None:
        """Tell the stepping what it must know before the pass: the learning rate, and the step's count on all ranks."""
        assert self.optimizer is not None
        self.optimizer.set_lr(self.multiplier(self.steps))
        total = self.ranks.sum_((self._count + count).clone()).clamp(min=1)
        stepping.arm((1.0 / total).float())

    def _loss_factor(self, count: Tensor) -> float:
        """What an fp16 loss sum is multiplied by: the loss scale over a power of two near the step's count.

        Sums over thousands of tokens would leave fp16's range; a power of two, the same on all ranks, undoes exactly.
        """
        assert self.scaler is not None
        if self._nominal is None:
            largest = max(self.ranks.all_gather_json(float(count)))
            expected = max(1.0, largest * self.accumulation * self.data_parallel.data.world)
            self._nominal = 2.0 ** round(math.log2(expected))
        return self.scaler.scale / self._nominal

    def poison(self) -> None:
        """Make this step's gradient NaN: what the fault action `nan` rehearses."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)

    # --- the step ---

    def step(self, guard: Guard | None = None) -> StepReport | None:
        """Divide by the step's count over all ranks, clip, update the parameters and start the next step.

        Does nothing but count, and returns None, after a micro-batch that is not the last of its step.

        `guard` sees the loss and the gradient norm on the host, which waits for the device; without it nothing waits.
        It decides alike on all ranks, because what it sees is the same on all.
        """
        if not self._open:
            raise RuntimeError("step() without a backward() before it: there is no gradient")
        last = self.at_boundary
        self._open = False
        self.micro_steps += 1
        if not last:
            return None
        if self.optimizer is None:
            raise ConfigError("this engine has no optimizer", hint="give one, or a config with an optim section")
        report = self._stepped(self.stepping) if self.stepping is not None else self._update(self.optimizer, guard)
        self.zero_grad()
        self.last_report = report
        return report

    def _update(self, optimizer: Optimizer, guard: Guard | None) -> StepReport:
        loss_sum, count, squares = self._global_sums()
        tokens = count
        count = count.clamp(min=1)
        scale = self._scale_of_gradients()
        loss = loss_sum / count
        norm_of_sum = squares / scale
        grad_norm = norm_of_sum / count
        overflow = self.skip_nonfinite and not math.isfinite(float(grad_norm))
        used = 1.0
        if self.scaler is not None:
            event = self.scaler.update(overflow)
            used = event.before
            if event.advice is not None:
                emit("warning", code="loss_scale", message=event.advice, step=self.steps)
        taken = not overflow and (guard is None or guard(float(loss), float(grad_norm)))
        optimizer.set_lr(self.multiplier(self.steps - self.skipped_steps))
        lr = float(optimizer.param_groups[0]["lr"])
        if taken:
            # Dividing by the count and clipping are one factor, folded into the optimizer's pass over the gradients.
            factor = clip_factor(norm_of_sum, self.clip_norm, scale=1.0 / count) / scale
            optimizer.step(gradient_factor=factor.float())
            if self.ema is not None:
                self.ema.update()
        self.steps += 1
        self.skipped_steps += overflow
        return StepReport(loss, grad_norm, tokens, lr, skipped=not taken, overflow=overflow, loss_scale=used)

    def _stepped(self, stepping: StepInBackward) -> StepReport:
        """The report of a step whose updates were made during the backward pass."""
        assert self.optimizer is not None
        stepping.finish()
        loss_sum, tokens, norm_of_sum = self._global_sums(stepping.squared_norms)
        count = tokens.clamp(min=1)
        if self.ema is not None:
            self.ema.update()
        self.steps += 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepReport(loss_sum / count, norm_of_sum / count, tokens, lr, skipped=False)

    def _global_sums(self, squares: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss sum, count, norm of the gradient sum) over all ranks, with one message."""
        sharded, replicated = squares or squared_norms(self._parameters)
        if self.ranks.world == 1:
            return self._loss_sum, self._count, norm_from(sharded, replicated)
        # Every replica of a shard adds the same squares.
        replicas = self.data_parallel.layout.replicas
        sums = torch.stack([self._loss_sum, self._count, sharded.to(self._loss_sum.dtype) / replicas])
        loss_sum, count, total = self.ranks.sum_(sums).unbind()
        return loss_sum, count, norm_from(total, replicated)

    def _scale_of_gradients(self) -> float:
        if self.scaler is None:
            return 1.0
        assert self._nominal is not None
        return self.scaler.scale / self._nominal

    def zero_grad(self) -> None:
        """Start the step over with no gradient and no counts."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self._count = torch.zeros_like(self._count)

    # --- state ---

    def state_dict(self) -> StateDict:
        """Everything a resumed run needs of this engine: weights, optimizer state, moving average, counters.

        Divided tensors are DTensors; names and shapes are the same in every layout.
        """
        state: StateDict = {
            "model": self.model.state_dict(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of `state_dict`; the moving average must be on or off in both."""
        self.data_parallel.drop_gathered()
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.skipped_steps = state.get("skipped_steps", 0)
        self.micro_steps = self.steps * self.accumulation
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def _sum_and_count(output: LossSum | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(output, Tensor):
        if output.numel() != 1:
            raise ConfigError(
                f"backward() got a loss of shape {list(output.shape)}, expected a scalar", hint="take its mean or sum"
            )
        return output.reshape(()), torch.ones((), dtype=torch.int64, device=output.device)
    return output.loss_sum, output.count
