"""`forward_backward` of a model that is cut over ranks: a whole batch goes through the pipeline in micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError
from trainwright.base.events import emit
from trainwright.comm.layout import Layout
from trainwright.comm.mesh import Axis
from trainwright.models import Backbone
from trainwright.parallel.pipeline.orders import build_schedule
from trainwright.parallel.pipeline.parts import Part
from trainwright.parallel.pipeline.split import split_of
from trainwright.parallel.pipeline.stage import Backward, Stage
from trainwright.parallel.pipeline.tied import sum_tied_gradients
from trainwright.parallel.pipeline.trace import Action, Recorder

__all__ = ["Batch", "Loss", "LossSum", "PipelineRunner", "cut_rows", "divides_backward"]

Batch = Mapping[str, Any]


class LossSum(Protocol):
    """What a loss gives for one micro-batch: the scalar sum over `count` trained tokens."""

    @property
    def loss_sum(self) -> Tensor: ...

    @property
    def count(self) -> Tensor: ...


Loss = Callable[[Any, Any], LossSum]
"""(model, micro-batch) -> loss sum and count: `Task.loss`, `Task.evaluate`. In a pipeline it asks the model for
`hidden_states` and goes on from there: it is called on the rank of the last part, where `hidden_states` gives what has
come through."""


class PipelineRunner:
    """Drives one rank's parts through the schedule of its split.

    Args:
        model: from `split_model`, divided, wrapped and compiled as it is to be.
        axis: the pipeline axis, of at least two ranks.
        device: where this rank computes.
        autocast: gives the context in which every part's forward pass runs.
        hidden_size: D; default the model's `config.hidden_size`.
        sequence_parts: ranks over which the hidden states between blocks are divided (sequence parallelism): parts hand
            on [B, T / sequence_parts, D].
        residual: the type of the hidden states inside the model; wire: that in which they travel (default: the same).
        layout: of the run; says where FSDP2 gives up parameters or sums gradients within a step.
        divide_backward: whether zero-bubble schedules compute the gradients of inputs and weights apart. None: where
            `divides_backward` says that it can be done; elsewhere the whole backward pass runs at the place of the
            inputs' (the same result, with bubbles).
        prepare: called with (model, micro-batch) before each part's forward pass; gives the batch that the part sees.
        traced: emit a `pipeline` event with the actions of every run.

    Attributes:
        actions: what this rank did in the last run, as it really ran.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        hidden_size: int | None = None,
        sequence_parts: int = 1,
        residual: torch.dtype = torch.float32,
        wire: torch.dtype | None = None,
        layout: Layout | None = None,
        divide_backward: bool | None = None,
        prepare: Callable[[Any, Any], Batch] | None = None,
        traced: bool = False,
    ) -> None:
        whole: Any = model
        self.model = whole
        self.axis = axis
        self.split = split_of(model)
        self.device = device
        self.autocast = autocast
        configured = hidden_size if hidden_size is not None else self.model.config.hidden_size
        self.hidden_size: int = configured
        self.sequence_parts = sequence_parts
        self.residual = residual
        self.wire = wire or residual
        self.divide_backward = divides_backward(model, layout) if divide_backward is None else divide_backward
        self.prepare = prepare
        self.traced = traced
        self.recorder = Recorder(axis.rank, device)
        self._schedules: dict[tuple[Any, ...], tuple[Any, list[Stage]]] = {}
        self._micro_batches: Sequence[Batch] = ()
        self._loss: Loss | None = None
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._scale = 1.0

    @property
    def actions(self) -> list[Action]:
        """What this rank did in the last run; waits for the device."""
        return self.recorder.actions()

    @property
    def holds_loss(self) -> bool:
        """Whether losses are computed on this rank: the one with the last part."""
        return self.split.holds_last

    def forward_backward(
        self,
        loss: Loss,
        batch: Batch | Sequence[Batch],
        *,
        micro_batches: int | None = None,
        begin_backward: Callable[..., None] | None = None,
        end_backward: Callable[..., None] | None = None,
        scale: float = 1.0,
        last: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the loss summed over the batch to the parameters of this rank; all ranks call it alike.

        Args:
            loss: see `Loss`. What the model itself adds to it (`Backbone.auxiliary_loss`) is taken for the other parts
                where they are, and counts in the sums that their ranks return.
            batch: this pipeline's rows, the same on all its ranks: tensors [rows, ...], cut into `micro_batches` equal
                pieces; or a sequence of micro-batches.
            begin_backward, end_backward: those of the model's `DataParallel`, called with `last` around every backward
                pass of every part.
            scale: what losses are multiplied by before the backward pass (fp16); not in what is returned.
            last: whether the optimizer steps after this batch: gradients of tied parameters are then summed.

        Returns: loss sum (fp64, fp32 on mps) and count (int64) of this pipeline's rows: on the rank that holds the last
            part; zeros on the others, so that a sum over all ranks counts them once.

        Raises:
            ConfigError: rows do not divide into micro-batches, micro-batches differ in shape, or their number does not
                fit the schedule (with every reason).
        """
        pieces = cut_rows(batch, micro_batches)
        schedule, stages = self._schedule(pieces, forward_only=False)
        total = len(stages) * len(pieces)
        begin, end = begin_backward or _nothing, end_backward or _nothing
        backward = Backward(begin, end, total, self.model, steps=last)
        for stage in stages:
            stage.backward = backward
        self._run(schedule.step, loss, pieces, scale)
        if last:
            sum_tied_gradients(self.model, self.axis)
        return self._totals()

    @torch.no_grad()
    def evaluate(
        self, loss: Loss, batch: Batch | Sequence[Batch], *, micro_batches: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss sum and count as `forward_backward` gives them, by forward passes only; any number of micro-batches."""
        pieces = cut_rows(batch, micro_batches)
        schedule, _ = self._schedule(pieces, forward_only=True)
        self._run(schedule.eval, loss, pieces, 1.0)
        return self._totals()

    # --- one run ---

    def _run(self, drive: Callable[..., Any], loss: Loss, pieces: Sequence[Batch], scale: float) -> None:
        self._micro_batches, self._loss, self._scale, self._sums = pieces, loss, scale, []
        self.recorder.begin()
        numbers = torch.arange(len(pieces))
        try:
            drive(target=numbers, losses=[], return_outputs=False)
        finally:
            self._micro_batches, self._loss = (), None
        if self.traced:
            self._emit(len(pieces))

    def _emit(self, micro_batches: int) -> None:
        actions = [[a.kind, a.part, a.micro_batch, a.start, a.end] for a in self.actions]
        emit(
            "pipeline",
            rank=self.axis.rank,
            schedule=self.split.schedule,
            micro_batches=micro_batches,
            actions=actions,
        )

    def _totals(self) -> tuple[Tensor, Tensor]:
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        loss_sum = torch.zeros((), dtype=wide, device=self.device)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for one_sum, one_count in self._sums:
            loss_sum += one_sum
            count += one_count
        self._sums = []
        return loss_sum, count

    def _computation(self, part: Part) -> Callable[[Tensor | None, int], Tensor]:
        def compute(x: Tensor | None, number: int) -> Tensor:
            micro_batch = self._micro_batches[number]
            if self.prepare is not None:
                micro_batch = self.prepare(self.model, micro_batch)
            with self.autocast():
                if x is not None:
                    x = x.to(self.residual)
                hidden: Tensor = self.model.run_stage(x, micro_batch, part)
                return self._loss_of(hidden, micro_batch) if part.is_last else self._message(hidden, part, micro_batch)

        return compute

    def _loss_of(self, hidden: Tensor, micro_batch: Batch) -> Tensor:
        assert self._loss is not None
        with _having_computed(self.model, hidden):
            output = self._loss(self.model, micro_batch)
        self._sums.append((output.loss_sum.detach(), output.count.detach()))
        return output.loss_sum * self._scale

    def _message(self, hidden: Tensor, part: Part, micro_batch: Batch) -> Tensor:
        expected = self._message_shape(micro_batch)
        if tuple(hidden.shape) != expected:
            raise ConfigError(
                f"part {part.index} of the pipeline put out {list(hidden.shape)}, and the next one expects "
                f"{list(expected)}",
                hint="hidden_size and sequence_parts of the PipelineRunner must be those of the model",
            )
        if torch.is_grad_enabled() and isinstance(self.model, Backbone):
            added = self.model.auxiliary_loss(micro_batch["labels"])
            if added is not None:
                self._sums.append((added.detach(), torch.zeros((), dtype=torch.int64, device=self.device)))
                hidden = _WithLoss.apply(hidden, added, self._scale)
        message = hidden.to(self.wire).contiguous()
        return message.clone() if message._is_view() else message  # torch takes the graph away from it in place

    def _message_shape(self, micro_batch: Batch) -> tuple[int, int, int]:
        rows, length = micro_batch["input_ids"].shape
        if length % self.sequence_parts:
            raise ConfigError(f"rows of {length} tokens cannot be divided over {self.sequence_parts} tensor ranks")
        return rows, length // self.sequence_parts, self.hidden_size

    def _schedule(self, pieces: Sequence[Batch], *, forward_only: bool) -> tuple[Any, list[Stage]]:
        shapes = {tuple(piece["input_ids"].shape) for piece in pieces}
        if len(shapes) != 1:
            raise ConfigError(
                f"micro-batches of different shapes in one step of a pipeline: {sorted(shapes)}",
                hint="parts hand on messages of one shape: use micro-batches of equal rows and length",
            )
        key = (self._message_shape(pieces[0]), len(pieces), forward_only)
        if key not in self._schedules:
            message = torch.empty(key[0], dtype=self.wire, device="meta", requires_grad=True)
            stages = [self._stage(part, message) for part in self.split.local]
            schedule = build_schedule(
                self.split.schedule, stages, len(pieces), lambda output, _: output, forward_only=forward_only
            )
            self._schedules[key] = schedule, stages
        return self._schedules[key]

    def _stage(self, part: Part, message: Tensor) -> Stage:
        assert self.axis.group is not None
        return Stage(
            part,
            self._computation(part),
            lambda: self._weights(part),
            message=message,
            device=self.device,
            group=self.axis.group,
            recorder=self.recorder,
            divides=self.divide_backward,
        )

    def _weights(self, part: Part) -> Iterator[nn.Parameter]:
        anatomy = self.split.anatomy
        names = [f"{anatomy.blocks}.{number}" for number in part.blocks]
        names += list(anatomy.before) if part.is_first else []
        names += list(anatomy.after) if part.is_last else []
        seen: set[int] = set()
        for name in names:
            for parameter in self.model.get_submodule(name).parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


class _WithLoss(torch.autograd.Function):
    """Hidden states as they are; in the backward pass, a loss of this part gets its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.like = torch.full_like(loss, scale)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.like, None


@contextlib.contextmanager
def _having_computed(model: Any, hidden: Tensor) -> Iterator[None]:
    """Inside, the hidden states of the model are these."""
    before = model.__dict__.get("hidden_states")
    model.__dict__["hidden_states"] = lambda *_, **__: hidden
    try:
        yield
    finally:
        del model.__dict__["hidden_states"]
        if before is not None:
            model.__dict__["hidden_states"] = before


def cut_rows(batch: Batch | Sequence[Batch], micro_batches: int | None) -> list[Batch]:
    """A batch as micro-batches of consecutive rows; one that is cut already is left as it is.

    Raises:
        ConfigError: the rows do not divide.
    """
    if not isinstance(batch, Mapping):
        return list(batch)
    count = 1 if micro_batches is None else micro_batches
    rows = len(batch["input_ids"])
    if count < 1 or rows % count:
        raise ConfigError(
            f"{rows} rows cannot be cut into {count} equal micro-batches", hint="change batch.micro or the batch size"
        )
    each = rows // count

    def piece(value: Any, number: int) -> Any:
        cut = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        return value[number * each : (number + 1) * each] if cut else value

    return [{name: piece(value, number) for name, value in batch.items()} for number in range(count)]


def divides_backward(model: nn.Module, layout: Layout | None = None) -> bool:
    """Whether the gradients of inputs and weights can be computed apart without computing anything twice.

    Not where something has taken over the forward pass of a block: compiled code has one backward pass for both, and a
    recomputed block would be computed again for each of its matrices. Nor where FSDP2 gives up parameters or sums
    gradients after every backward pass: it knows of no second one.
    """
    if layout is not None and layout.is_sharded and (layout.gather == "micro_batch" or layout.accumulate == "sharded"):
        return False
    split = split_of(model)
    blocks = [model.get_submodule(f"{split.anatomy.blocks}.{n}") for part in split.local for n in part.blocks]
    taken_over = any("forward" in block.__dict__ for block in blocks)
    recomputed = any(getattr(block, "gradient_checkpointing", False) for block in blocks)
    return not taken_over and not recomputed


def _nothing(*, last: bool) -> None:
    del last
