"""Copies of tokens to the ranks that hold their experts, and back: two exchanges of uneven parts (GShard, arXiv
2006.16668).

Before the copies the ranks tell each other how many come, for each expert: one small exchange more, after which the
host waits for the device once, because the sizes of messages have to be known there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.comm.mesh import Axis
from trainwright.ops.contents import has_contents
from trainwright.ops.token_permutation import reorder_rows

__all__ = ["Arrivals", "exchange_counts", "exchange_rows", "run_at_experts"]


@dataclass(frozen=True)
class Arrivals:
    """What one rank sends and gets.

    Attributes:
        sent, received: rows to and from each rank of the axis.
        counts: [experts here], rows of each expert here, from all ranks together.
        order, inverse: rows come sorted by rank, then by expert; rows[order] is sorted by expert alone.
    """

    sent: list[int]
    received: list[int]
    counts: Tensor
    order: Tensor
    inverse: Tensor


def exchange_counts(counts: Tensor, axis: Axis) -> Arrivals:
    """Tell all ranks of the axis how many rows each of their experts gets from here: counts [all experts]."""
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts.contiguous(), group=axis.group)
    coming = coming.view(axis.size, -1)
    sent, received = torch.stack((counts.view(axis.size, -1).sum(1), coming.sum(1))).tolist()
    here = coming.shape[1]
    experts = torch.arange(here, device=counts.device).repeat(axis.size)
    order = torch.repeat_interleave(experts, coming.flatten(), output_size=sum(received)).argsort(stable=True)
    return Arrivals(sent, received, coming.sum(0), order, _inverse(order))


def even_arrivals(rows: int, experts: int, axis: Axis, device: torch.device) -> Arrivals:
    """Of a model that has shapes and no routing: equally many rows for all."""
    each = [rows // axis.size + (rank < rows % axis.size) for rank in range(axis.size)]
    received = [each[axis.rank]] * axis.size
    order = torch.empty(sum(received), dtype=torch.int64, device=device)
    return Arrivals(each, received, order.new_empty(experts // axis.size), order, torch.empty_like(order))


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def run_at_experts(experts: Any, copies: Tensor, counts: Tensor, axis: Axis) -> Tensor:
    """Copies [M, D] in the order of all experts, counts [all experts], through the experts on all ranks: [M, D].

    experts: (rows [R, D] sorted by expert, counts [experts here]) -> [R, D], the experts of this rank.
    """
    if has_contents(copies):
        arrivals = exchange_counts(counts, axis)
    else:
        arrivals = even_arrivals(copies.shape[0], counts.numel(), axis, copies.device)
    rows = exchange_rows(copies, arrivals.sent, arrivals.received, axis.group)
    done = experts(reorder_rows(rows, arrivals.order, arrivals.inverse), arrivals.counts)
    back = reorder_rows(done, arrivals.inverse, arrivals.order)
    return exchange_rows(back, arrivals.received, arrivals.sent, axis.group)


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The first sent[0] rows to rank 0, and so on; returns received[0] rows from rank 0, and so on.

    The gradient travels the other way.
    """
    out: Tensor = _Exchange.apply(rows, sent, received, group)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
