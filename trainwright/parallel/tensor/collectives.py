"""The exchanges of activations between the ranks of a tensor axis, each with its transpose as its gradient.

The operators are those that torch's compiler knows (`torch.ops._c10d_functional`): a block that exchanges activations
compiles into one graph, and torch can overlap them with matrix products. They are private names of torch, stable from
2.11 to 2.13, and used in this file only; the public functions write into buffers, which autograd cannot follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainwright.comm.mesh import Axis

__all__ = [
    "cut",
    "cut_and_gather_gradient",
    "gather",
    "gather_and_cut_gradient",
    "gather_and_scatter_gradient",
    "keep_and_sum_gradient",
    "scatter_sum_and_gather_gradient",
    "stack_parts",
    "sum_and_keep_gradient",
]

_ops = torch.ops._c10d_functional


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return str(axis.group.group_name)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The parts of all ranks, equally large, joined along `dim` in the order of ranks. No gradient."""
    whole = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), axis.size, _name(axis)))
    return whole if dim == 0 else torch.cat(torch.chunk(whole, axis.size, dim=0), dim=dim)


def stack_parts(x: Tensor, axis: Axis) -> Tensor:
    """What all ranks pass, [size, ...]. No gradient."""
    return gather(x[None], axis, 0)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks, the same bits on each. No gradient."""
    summed: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", _name(axis)))
    return summed


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over the ranks; the size must divide. No gradient."""
    if dim != 0:
        x = torch.cat(torch.chunk(x, axis.size, dim=dim), dim=0)
    part: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, _name(axis)))
    return part


def cut(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of x along `dim`; the size must divide. A view, with an ordinary gradient."""
    size = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * size, size)


class _GatherScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(grad, ctx.axis, ctx.dim), None, None


class _ScatterGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad, ctx.axis, ctx.dim), None, None


class _KeepSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grad, ctx.axis), None


class _SumKeep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GatherCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, size: int) -> Tensor:
        ctx.axis, ctx.size, ctx.here = axis, size, x.shape[-1]
        each = -(-size // axis.size)
        # Ranks at the end may have less, or nothing: all send as much, and the surplus is at the very end.
        padded = torch.nn.functional.pad(x, (0, each - x.shape[-1])) if x.shape[-1] < each else x
        return gather(padded, axis, x.dim() - 1)[..., :size]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        begin = ctx.axis.rank * -(-ctx.size // ctx.axis.size)
        return grad[..., begin : begin + ctx.here], None, None


class _CutGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.dim = axis, x.dim() - 1
        return cut(x, axis, ctx.dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad, ctx.axis, ctx.dim), None


def gather_and_scatter_gradient(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All ranks' parts along `dim`; each rank's gradient of the whole is a part of it, and they are summed."""
    out: Tensor = _GatherScatter.apply(x, axis, dim)
    return out


def scatter_sum_and_gather_gradient(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over all ranks."""
    out: Tensor = _ScatterGather.apply(x, axis, dim)
    return out


def keep_and_sum_gradient(x: Tensor, axis: Axis) -> Tensor:
    """x itself, the same on all ranks; each rank's gradient of it is a part, and they are summed."""
    out: Tensor = _KeepSum.apply(x, axis)
    return out


def sum_and_keep_gradient(x: Tensor, axis: Axis) -> Tensor:
    """The sum over all ranks, of which every rank's gradient is the same."""
    out: Tensor = _SumKeep.apply(x, axis)
    return out


def gather_and_cut_gradient(x: Tensor, axis: Axis, size: int) -> Tensor:
    """All ranks' parts of the last dimension of `size`, cut into pieces of ceil(size / ranks); every rank's gradient of
    the whole is the same.
    """
    out: Tensor = _GatherCut.apply(x, axis, size)
    return out


def cut_and_gather_gradient(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the last dimension of x, which is the same on all ranks."""
    out: Tensor = _CutGather.apply(x, axis)
    return out
