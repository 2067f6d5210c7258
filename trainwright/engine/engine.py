"""The engine: forward under the right precision, backward that accumulates sums, one step that normalises once.

It composes the rooms below and contains no feature of its own. Because losses arrive as sums and counts and are divided
once per optimizer step by the number of tokens of *all* micro-batches of *all* ranks, gradient accumulation, packing
and data parallelism cannot change the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from trainwright.engine.names import with_tied_names, without_tied_names
from trainwright.engine.precision import Precision
from trainwright.memory import PlacedState
from trainwright.models import Backbone
from trainwright.models.moe.load import join_load_statistics
from trainwright.optim import EMA, LossScaler, StepInBackward, clip_factor, parts_of, squared_norm_sum
from trainwright.optim.groups import NOTHING_TO_TRAIN
from trainwright.parallel import DataParallel, apply_zero
from trainwright.parallel.pipeline import alias_parameters
from trainwright.parallel.pipeline.runner import Loss, LossSum

__all__ = ["Batch", "Engine", "ForwardBackward", "Loss", "LossSum", "Optimizer", "StepReport"]

ROW_NUMBERS = "row_numbers"
"""Key of a micro-batch: where each of its rows is in the global batch."""

Batch = Mapping[str, Tensor]
"""Rows of a batch: tensors whose first dimension is rows."""

Guard = Callable[[float, float], bool]
"""Given the mean loss and the gradient norm of a step, says whether the step may be taken."""


class ForwardBackward(Protocol):
    """How the forward and backward passes of one optimizer step are carried out: one by one, or as a pipeline.

    `run` leaves the gradients summed and returns (loss sum, count) of this rank, fp64 scalars; `evaluate` only computes
    them. Ranks that compute no loss return zeros.
    """

    def run(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]: ...

    def evaluate(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]: ...


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
        schedule: makes what carries out `forward_backward` for this engine; None takes the micro-batches one by one.
        cut: takes this rank's part of every row of a batch, where sequences are divided.

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
        schedule: Callable[[Engine], ForwardBackward] | None = None,
        cut: Callable[[Batch], Batch] | None = None,
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
        if stepping is not None:
            stepping.holders = self._holders
        self.placed = placed
        self.steps = 0
        self.skipped_steps = 0
        self.micro_steps = 0
        self.last_report: StepReport | None = None
        groups = optimizer.param_groups if optimizer is not None else []
        self._parameters = [p for group in groups for p in group["params"]]
        staged = self.data_parallel.mesh.pipeline.size > 1  # then this stage may be frozen, but not all
        if staged and optimizer is not None and not self.ranks.any(bool(self._parameters)):
            raise ConfigError(NOTHING_TO_TRAIN, hint="remove a freeze rule or unfreeze the model")
        aliases = alias_parameters(model)  # copies of parameters that another stage of a pipeline counts
        names = {p: name for name, p in model.named_parameters()} if aliases else {}
        self._counted = [p for p in self._parameters if names.get(p) not in aliases]
        trained = self._parameters or [p for p in model.parameters() if p.requires_grad]
        self._device = self.ranks.device if self.ranks.world > 1 or not trained else trained[0].device
        # Sums over a step, in fp64 so that they do not depend on how rows are dealt to micro-batches and ranks.
        wide = torch.float32 if self._device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=wide, device=self._device)
        self._count = torch.zeros((), dtype=wide, device=self._device)
        self._schedule: ForwardBackward = OneByOne(self) if schedule is None else schedule(self)
        self._cut = cut
        # Ranks of the tensor axis compute the same loss: the first of them speaks for all.
        self._counts_loss = self.data_parallel.mesh.tensor.rank == 0
        self._open = False
        self._held_back = 0
        self._forced: bool | None = None
        self._nominal: float | None = None
        self._dropout_seed: int | None = None

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
        (loss if self.scaler is None else loss * self.loss_factor(count)).backward()
        self.data_parallel.end_backward(last=last)
        if self._counts_loss:
            self._loss_sum += loss.detach()
            self._count += count
        return loss.detach()

    def _arm(self, stepping: StepInBackward, count: Tensor) -> None:
        """Tell the stepping what it must know before the pass: the learning rate, and the step's count on all ranks."""
        assert self.optimizer is not None
        self.optimizer.set_lr(self.multiplier(self.steps))
        own = self._count + count if self._counts_loss else torch.zeros_like(self._count)
        total = self.ranks.sum_(own.clone()).clamp(min=1)
        stepping.arm((1.0 / total).float())

    def loss_factor(self, count: Tensor) -> float:
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

    # --- a whole step's batch ---

    def forward_backward(self, loss: Loss, batch: Batch, *, micro_rows: int, seed: int | None = None) -> None:
        """Forward and backward over this rank's rows of a whole step, `micro_rows` at a time; `step` comes next.

        Args:
            loss: see `Loss`; called with the model and one micro-batch at a time.
            batch: equal on all ranks that work on the same rows; sequences are whole.
            micro_rows: divides the rows of the batch into `accumulation` micro-batches.
            seed: of this step's dropout, which then depends on it and on each row's place in the global batch, not on
                the layout; None draws from torch's generator.
        """
        micro_batches = self._micro_batches(batch, micro_rows)
        if len(micro_batches) != self.accumulation:
            raise ConfigError(
                f"the batch makes {len(micro_batches)} micro-batches of {micro_rows} rows, and a step has"
                f" {self.accumulation}"
            )
        self._dropout_seed = seed
        before = self.micro_steps
        loss_sum, count = self._schedule.run(loss, micro_batches)
        self.micro_steps = before + len(micro_batches) - 1  # the last one is counted by the step
        self._open = True
        if self._counts_loss:
            self._loss_sum += loss_sum
            self._count += count

    def evaluate(self, loss: Loss, batch: Batch, *, micro_rows: int | None = None) -> tuple[float, int]:
        """(loss sum, count) that this rank adds to an evaluation of its rows; summed over all ranks they are whole."""
        rows = micro_rows or next(iter(batch.values())).shape[0]
        self._dropout_seed = None
        with torch.no_grad():
            loss_sum, count = self._schedule.evaluate(loss, self._micro_batches(batch, rows))
        return (float(loss_sum), int(count)) if self._counts_loss else (0.0, 0)

    def _micro_batches(self, batch: Batch, rows: int) -> list[Batch]:
        place, _ = self.data_parallel.mesh.rows
        total = next(iter(batch.values())).shape[0]
        cut = dict(batch if self._cut is None else self._cut(batch))
        # Rank r of W holds the r-th of W parts of the global batch, as the loader deals it: what dropout goes by.
        cut[ROW_NUMBERS] = torch.arange(total, device=self._device) + place * total
        return [{key: value[first : first + rows] for key, value in cut.items()} for first in range(0, total, rows)]

    def prepare(self, model: Any, micro_batch: Batch) -> Batch:
        """What a schedule calls before a part of the model sees a micro-batch: tells dropout which rows they are."""
        rest = {key: value for key, value in micro_batch.items() if key != ROW_NUMBERS}
        if hasattr(model, "set_dropout"):
            rows = None if self._dropout_seed is None else micro_batch[ROW_NUMBERS]
            model.set_dropout(seed=self._dropout_seed, rows=rows)
        return rest

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
        self._balance_experts(taken=not report.skipped)
        self.last_report = report
        return report

    def _balance_experts(self, *, taken: bool) -> None:
        """Tell a mixture of experts what all ranks' tokens asked of it in this step."""
        loads = self.model.take_loads() if isinstance(self.model, Backbone) else None
        if loads is not None and taken:
            self.model.update_balance(self.data_parallel.data.sum_(loads))

    def load_statistics(self) -> dict[str, float]:
        """How evenly the last step loaded the experts of all layers; empty without experts. All ranks call it."""
        own = self.model.load_statistics() if isinstance(self.model, Backbone) else {}
        if self.data_parallel.mesh.pipeline.size == 1 or not isinstance(self.model, Backbone):
            return own
        return join_load_statistics(self.ranks.all_gather_json(own))

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
        loss_sum, tokens, norm_of_sum = self._global_sums(stepping.squared_norm)
        count = tokens.clamp(min=1)
        if self.ema is not None:
            self.ema.update()
        self.steps += 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepReport(loss_sum / count, norm_of_sum / count, tokens, lr, skipped=False)

    def _global_sums(self, squares: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss sum, count, norm of the gradient sum) over all ranks, with one message."""
        total = squared_norm_sum(self._counted, self._holders) if squares is None else squares
        if self.ranks.world == 1:
            return self._loss_sum, self._count, total.sqrt().float()
        sums = torch.stack([self._loss_sum, self._count, total.to(self._loss_sum)])
        loss_sum, count, total = self.ranks.sum_(sums).unbind()
        return loss_sum, count, total.sqrt().float()

    def _holders(self, parameter: Tensor) -> int:
        """How many ranks hold the same part of a parameter as this one: so often a sum over all ranks counts it."""
        layout = self.data_parallel.layout
        return layout.data * layout.tensor // parts_of(parameter)

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
            "model": with_tied_names(self.model, self.model.state_dict()),
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
        self.model.load_state_dict(without_tied_names(self.model, state["model"]))
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.skipped_steps = state.get("skipped_steps", 0)
        self.micro_steps = self.steps * self.accumulation
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


class OneByOne:
    """One micro-batch after another: the schedule of a model that is whole on every rank that computes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        engine = self._engine
        for number, micro_batch in enumerate(micro_batches):
            output = self._forward(loss, micro_batch)
            engine.backward(output)
            if number + 1 < len(micro_batches):
                engine.step()
        return torch.zeros_like(engine._loss_sum), torch.zeros_like(engine._count)  # backward has added them

    def evaluate(self, loss: Loss, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        outputs = [self._forward(loss, micro_batch) for micro_batch in micro_batches]
        wide = self._engine._loss_sum.dtype
        return (
            torch.stack([output.loss_sum.to(wide) for output in outputs]).sum(),
            torch.stack([output.count for output in outputs]).sum(),
        )

    def _forward(self, loss: Loss, micro_batch: Batch) -> LossSum:
        engine = self._engine
        prepared = engine.prepare(engine.model, micro_batch)
        with engine.autocast():
            return loss(engine.model, prepared)


def _sum_and_count(output: LossSum | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(output, Tensor):
        if output.numel() != 1:
            raise ConfigError(
                f"backward() got a loss of shape {list(output.shape)}, expected a scalar", hint="take its mean or sum"
            )
        return output.reshape(()), torch.ones((), dtype=torch.int64, device=output.device)
    return output.loss_sum, output.count
