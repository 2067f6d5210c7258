"""One parameter on two ranks: the embedding on the first, its copy as the head's weight on the last.

Both ranks add up the same two gradients in the same order, so that the same optimizer step keeps the copies equal bit
by bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.comm.mesh import Axis
from trainwright.parallel.pipeline.split import split_of

__all__ = ["sum_tied_gradients"]


@torch.no_grad()
def sum_tied_gradients(model: nn.Module, axis: Axis) -> None:
    """Make the gradient of every tied parameter the sum of the first and the last part's; all ranks call it.

    Call it when gradients are complete over micro-batches and data-parallel ranks, before their norm is taken. Nothing
    happens where both parts are on one rank (V schedules). Divided gradients are divided alike on both ranks.
    """
    split = split_of(model)
    first, last = split.holds_first, split.holds_last
    if first == last:
        return
    peer = axis.size - 1 if first else 0
    for kept, alias in split.anatomy.tied:
        parameter = model.get_parameter(kept if first else alias)
        if parameter.requires_grad:
            _add(parameter, axis, peer, first=first)


def _add(parameter: nn.Parameter, axis: Axis, peer: int, *, first: bool) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    sent = own.to(_wire_device(own, axis)).contiguous()
    received = torch.empty_like(sent)
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=axis.group, group_peer=peer),
            dist.P2POp(dist.irecv, received, group=axis.group, group_peer=peer),
        ]
    )
    for message in work:
        message.wait()
    own.copy_(_sum(sent, received) if first else _sum(received, sent))


def _sum(of_first: Tensor, of_last: Tensor) -> Tensor:
    return of_first + of_last


def _wire_device(own: Tensor, axis: Axis) -> torch.device:
    """Where a gradient travels from: a group without gloo cannot send what is kept on the host."""
    if own.device.type == "cpu" and "gloo" not in dist.get_backend(axis.group):
        return torch.device("cuda", torch.cuda.current_device())
    return own.device
