"""One part of attention by torch's flash kernels on CUDA: forward and backward with the log-sum-exp handed in and out.

The two operators are private names of torch (`aten::_flash_attention_forward` and `..._backward`): the public
`scaled_dot_product_attention` neither gives the log-sum-exp away nor takes one for its backward pass. The same two are
what torch's own context parallelism calls. Tensors are [B, T, H, D]; grouped-query heads are native to them.

A kernel puts the last query beside the last key. Queries that stand further right, as those of another piece of the
sequence do, see all keys; with a window the rectangle is first trimmed to what is in reach, so that the window's edge
can be given as a distance from that diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.ops.attention.merge import merge_parts
from trainwright.ops.attention.pairs import Rectangle

__all__ = ["backward", "forward", "is_usable"]

MOST_HEAD_DIM = 256


class _Call(NamedTuple):
    """A kernel's rectangle: queries [q0, q1), keys [k0, k1). left: keys seen left of the diagonal, -1 for all."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    left: int


def is_usable(q: Tensor, areas: Sequence[Rectangle]) -> bool:
    """Whether the kernels take such queries and rectangles.

    Half precision on a GPU of Ampere's generation or later; masked rectangles are square and lie on the diagonal or
    wholly beside it, as those of equally long pieces of a sequence do.
    """
    return (
        all(area.free or _is_square(area) for area in areas)
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= MOST_HEAD_DIM
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _is_square(area: Rectangle) -> bool:
    queries, keys = area.q1 - area.q0, area.k1 - area.k0
    return queries == keys and (area.q_first == area.k_first or area.k_first + keys <= area.q_first)


def forward(
    q: Tensor, k: Tensor, v: Tensor, areas: Sequence[Rectangle], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, Hq, D] and lse [B, Hq, T] in fp32 over the keys of `areas` (whole runs, not blocks)."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32, device=q.device)
    for call in _calls(areas, window):
        rows, keys = slice(call.q0, call.q1), slice(call.k0, call.k1)
        part, part_lse = _forward_kernel(q[:, rows], k[:, keys], v[:, keys], call.causal, call.left, scale)
        out[:, rows], lse[:, :, rows] = merge_parts(out[:, rows], lse[:, :, rows], part, part_lse)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    areas: Sequence[Rectangle],
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in fp32; out and lse are those over all keys."""
    grads = tuple(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    grad_out, out = grad_out.to(q.dtype), out.to(q.dtype)
    for call in _calls(areas, window):
        rows, keys = slice(call.q0, call.q1), slice(call.k0, call.k1)
        shares = _backward_kernel(
            grad_out[:, rows].contiguous(),
            q[:, rows],
            k[:, keys],
            v[:, keys],
            out[:, rows].contiguous(),
            lse[:, :, rows].float().contiguous(),
            call.causal,
            call.left,
            scale,
        )
        for grad, share, inside in zip(grads, shares, (rows, keys, keys), strict=True):
            grad[:, inside] += share
    return grads[0], grads[1], grads[2]


def _calls(areas: Sequence[Rectangle], window: int | None) -> list[_Call]:
    """Rectangles as kernels take them; neighbours without any mask become one."""
    calls: list[_Call] = []
    for area in areas:
        if area.free:
            _add_free(calls, _Call(area.q0, area.q1, area.k0, area.k1, False, -1))
        elif area.q_first == area.k_first:
            calls.append(_Call(area.q0, area.q1, area.k0, area.k1, True, -1 if window is None else window - 1))
        else:
            calls.append(_trimmed(area, window))
    return calls


def _trimmed(area: Rectangle, window: int | None) -> _Call:
    """The part of a rectangle to the right of the diagonal that a window reaches into."""
    assert window is not None, "beside the diagonal nothing else masks"
    distance = area.q_first - area.k_first
    k0 = max(area.k0, area.k0 + distance - window + 1)
    q1 = min(area.q1, area.q0 + (area.k1 - area.k0) + window - 1 - distance)
    # Query i and key j of the trimmed rectangle are distance - (k0 - area.k0) + i - j apart; the kernel allows
    # i + (keys - queries) - j <= left.
    left = (area.k1 - k0) - (q1 - area.q0) + window - 1 - (distance - (k0 - area.k0))
    return _Call(area.q0, q1, k0, area.k1, False, left)


def _add_free(calls: list[_Call], new: _Call) -> None:
    for index, old in enumerate(calls):
        if old.causal or old.left >= 0:
            continue
        if (old.q0, old.q1, old.k1) == (new.q0, new.q1, new.k0):
            calls[index] = old._replace(k1=new.k1)
            return
        if (old.k0, old.k1, old.q1) == (new.k0, new.k1, new.q0):
            calls[index] = old._replace(q1=new.q1)
            return
    calls.append(new)


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left if left >= 0 else None,
        window_size_right=0 if causal and left >= 0 else None,
    )
    return out.float(), lse


def _backward_kernel(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    no_random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only where dropout is above zero
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        causal,
        no_random_state,
        torch.empty(0, dtype=torch.uint64, device=q.device),
        scale=scale,
        window_size_left=left if left >= 0 else None,
        window_size_right=0 if causal and left >= 0 else None,
    )
    return grads
