"""One part of the model as torch.distributed.pipelining sees it.

torch's stage would manage FSDP2 modules itself, hold a buffer for every message of a step from the first step on, and
learn shapes by running the model once more. Here gradients travel as `DataParallel` says, a message's memory lives from
its arrival to its use, and shapes are given. Names that torch does not document are used in this file only: the maps of
messages (`args_recv_info`, `grad_recv_info`), and FSDP2's final callback, because weight gradients that are computed
apart from the backward pass reach FSDP2 in no other way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from trainwright.parallel.pipeline.parts import Part
from trainwright.parallel.pipeline.trace import Recorder

__all__ = ["Backward", "Stage"]

Compute = Callable[[Tensor | None, int], Tensor]
"""(input of the part or None, number of the micro-batch) -> output of the part, or the loss."""


class Backward:
    """When the gradients of a rank are complete, over all its parts.

    Args:
        begin, end: called around every backward pass with `last`: whether it completes the gradients of the step.
        total: backward passes that complete a micro-batch of a part: parts x micro-batches.
        model: what the gradients belong to.
    """

    def __init__(
        self, begin: Callable[..., None], end: Callable[..., None], total: int, model: nn.Module, *, steps: bool
    ) -> None:
        self._begin = begin
        self._end = end
        self._left = total
        self._model = model
        self._steps = steps

    @contextlib.contextmanager
    def around(self, recorder: Recorder, part: int, *, completes: bool, apart: bool = False) -> Iterator[None]:
        """A backward pass runs inside. apart: it is that of weights alone, which autograd's hooks do not see."""
        self._left -= completes
        last = completes and self._left == 0 and self._steps
        self._begin(last=last)
        yield
        start = recorder.now()
        if apart and last and isinstance(self._model, FSDPModule):
            self._model._get_fsdp_state()._root_post_backward_final_callback()
        self._end(last=last)
        if last:
            recorder.note("R", part, -1, start)


class _Computation(nn.Module):
    """What torch takes for the stage's module. It owns nothing, so that nobody finds FSDP2 modules in it."""

    def __init__(self, compute: Compute, weights: Callable[[], Iterable[nn.Parameter]]) -> None:
        super().__init__()
        self.compute = compute
        self.weights = weights
        self.micro_batch = 0

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.compute(x, self.micro_batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        del recurse
        return iter(self.weights())


class Stage(PipelineStage):
    """A part of the model in one schedule, for messages of one shape.

    Args:
        part: which part, of how many.
        compute: runs it, the loss of the last part included.
        weights: its parameters as they are now (FSDP2 exchanges them).
        message: a meta tensor of the shape and type of what parts hand on.
        divides: whether the gradients of inputs and weights are computed apart where the schedule wants it.
    """

    def __init__(
        self,
        part: Part,
        compute: Compute,
        weights: Callable[[], Iterable[nn.Parameter]],
        *,
        message: Tensor,
        device: torch.device,
        group: dist.ProcessGroup,
        recorder: Recorder,
        divides: bool,
    ) -> None:
        loss = torch.empty((), device="meta", requires_grad=True)
        computation = _Computation(compute, weights)
        super().__init__(
            computation,
            part.index,
            part.count,
            device,
            input_args=() if part.is_first else (message,),
            output_args=(loss if part.is_last else message,),
            group=group,
        )
        self.computation = computation
        self.recorder = recorder
        self.divides = divides
        self.backward: Backward | None = None

    # --- messages: memory from arrival to use ---

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_room(self, awaited: Iterable[Any]) -> None:
        for info in awaited:
            meta = getattr(info, "tensor_meta", None)
            if meta is not None and not info.is_root_arg:
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    def _prepare_forward_infra(self, *inputs: Any, **named: Any) -> Any:
        result = super()._prepare_forward_infra(*inputs, **named)
        for awaited in self.args_recv_info.values():
            _give_up(awaited)
        return result

    def _prepare_backward_infra(self, *inputs: Any, **named: Any) -> Any:
        result = super()._prepare_backward_infra(*inputs, **named)
        for awaited in self.grad_recv_info.values():
            _give_up(awaited)
        return result

    def _post_metadata_inference_cleanup(self) -> None:
        """Nothing was inferred."""

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else None

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:  # torch 2.13 calls it in evaluation too, and refuses then
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # --- computing ---

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        start = self.recorder.now()
        self.computation.micro_batch = fwd_chunk_id
        with _own_error():
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        _give_up(self.args_recv_info[fwd_chunk_id])
        self.recorder.note("F", self.stage_index, fwd_chunk_id, start)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not self.has_backward:
            return
        assert self.backward is not None
        whole = full_backward or not self.divides
        start = self.recorder.now()
        with self.backward.around(self.recorder, self.stage_index, completes=whole), _own_error():
            super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=whole)
            if whole or not self.is_first:  # torch leaves all work of the first part to W
                self.recorder.note("B" if whole else "I", self.stage_index, bwd_chunk_id, start)
        if not self.is_last:
            _give_up(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward or not self.divides:
            return
        assert self.backward is not None
        start = self.recorder.now()
        apart = not self.is_first
        with self.backward.around(self.recorder, self.stage_index, completes=True, apart=apart), _own_error():
            super().backward_weight_one_chunk(bwd_chunk_id)
            if apart:
                _run_hooks(self.computation.parameters())
            self.recorder.note("W" if apart else "B", self.stage_index, bwd_chunk_id, start)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: gradients have travelled as the data parallelism of the model says."""


def _give_up(awaited: Iterable[Any]) -> None:
    for info in awaited:
        if getattr(info, "buffer", None) is not None:
            info.buffer = None


def _run_hooks(parameters: Iterable[nn.Parameter]) -> None:
    """Run the hooks that wait for gradients: torch adds those of W without autograd's knowing."""
    for parameter in parameters:
        if parameter.grad is not None:
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)


@contextlib.contextmanager
def _own_error() -> Iterator[None]:
    """torch wraps what a part raises into a RuntimeError of its own; the cause says more."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is not None and "failed to run" in str(error).lower():
            raise error.__cause__ from None
        raise
