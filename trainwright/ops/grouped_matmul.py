"""Products of rows with the matrix of their group, groups being neighbours: what a layer of experts computes.

Nothing is padded and nothing is dropped (MegaBlocks, arXiv 2211.15841). On a GPU one kernel does all groups without
the host knowing their sizes; elsewhere a loop over the groups writes into one result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.ops.contents import has_contents

__all__ = ["GroupedKernel", "grouped_matmul", "grouped_matmul_reference"]

_ALIGNMENT = 16
"""Bytes; the kernel reads rows whose length is a multiple of this."""


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [M, K] times the transpose of its group's matrix of weight [G, N, K]; returns [M, N].

    counts [G], integers that add up to M: the first counts[0] rows belong to group 0, and so on. Under autocast the
    product is made in autocast's type, as `linear` does. Where no kernel is, reading `counts` waits for the device.
    """
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        x, weight = x.to(wanted), weight.to(wanted)
    elif x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    if not has_contents(x):
        out: Tensor = _Shapes.apply(x, weight)
    elif _has_kernel(x, weight):
        out = GroupedKernel.apply(x, weight, counts.cumsum(0, dtype=torch.int32))
    else:
        out = _Loop.apply(x, weight, counts.tolist())
    return out


def grouped_matmul_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The definition, row by row."""
    group = torch.repeat_interleave(torch.arange(weight.shape[0], device=x.device), counts)
    return torch.einsum("mk,mnk->mn", x, weight[group])


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not x.shape[0]:
        return False
    aligned = all(size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


class GroupedKernel(torch.autograd.Function):
    """torch's grouped product in all three places. ends [G], int32: where each group's rows end.

    torch's own gradient of it takes the gradient that comes as it lies in memory, which the kernel refuses where it has
    no memory of its own (an expanded one).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        to_x = F.grouped_mm(gradient, weight, offs=ends) if needs_x else None
        to_weight = F.grouped_mm(gradient.t(), x, offs=ends) if needs_weight else None
        return to_x, to_weight, None


class _Loop(torch.autograd.Function):
    """One product for each group that has rows, written where it belongs: nothing is joined afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, group in _segments(counts):
            torch.mm(x[rows], weight[group].t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        to_x = torch.empty_like(x) if needs_x else None
        to_weight = torch.zeros_like(weight) if needs_weight else None
        for rows, group in _segments(ctx.counts):
            if to_x is not None:
                torch.mm(gradient[rows], weight[group], out=to_x[rows])
            if to_weight is not None:
                torch.mm(gradient[rows].t(), x[rows], out=to_weight[group])
        return to_x, to_weight, None


class _Shapes(torch.autograd.Function):
    """What the product holds and gives, without its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _segments(counts: list[int]) -> list[tuple[slice, int]]:
    found, first = [], 0
    for group, count in enumerate(counts):
        if count:
            found.append((slice(first, first + count), group))
        first += count
    return found
