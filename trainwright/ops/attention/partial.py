"""Attention over a part of the keys, with what is needed to join it to the rest: one hop of ring attention.

A query's softmax over all keys is a weighted mean of its softmaxes over parts of them; the weights follow from the
log-sum-exp of each part's scores (arXiv 2310.01889; the scheme inside a part is FlashAttention's, arXiv 2205.14135).
The backward pass of a part needs only the log-sum-exp over *all* keys, so parts can be gone through in any order.

On CUDA torch's flash kernels do the work where order and window are all that masks (`flash`); else, and on CPUs, blocks
in plain torch, whose steps between two products `compiled=True` fuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# The one private name: a tensor without contents must not be gone through block by block (a dry run of a long row).
from torch._subclasses.fake_tensor import FakeTensor

from trainwright.ops.attention import flash
from trainwright.ops.attention.pairs import Rectangle, block_pairs, check_part, pair_mask, rectangles
from trainwright.ops.dropout import keep_mask

__all__ = ["DroppedWeights", "attention_part", "attention_part_backward"]

# Measured on 2 cores at 1x8x4096x64 bf16, forward + backward, plain / compiled: 128 x 512: 659 / 406 ms, 256 x 256:
# 459 / 328, 256 x 512: 520 / 337, 512 x 512: 507 / 296; torch's flash kernel: 347, the `blocked` backend plain: 710.
Q_BLOCK, K_BLOCK = 256, 256


class DroppedWeights(NamedTuple):
    """Which attention weights are dropped out, as a function of query, head and key (`ops.dropout`).

    p: the probability. keys: int64 [B, Hq, T], one for each query and head. places: int [B or 1, S], of the keys.
    """

    p: float
    keys: Tensor
    places: Tensor

    def factor(self, area: Rectangle, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """What the weights of one block are multiplied by, 0 or 1 / (1 - p): [B, Hkv, G, queries, keys]."""
        places = self.places[:, None, None, area.k0 : area.k1]
        keep = keep_mask(self.keys[:, :, area.q0 : area.q1], places, self.p)
        return (keep.to(dtype) * (1.0 / (1.0 - self.p))).unflatten(1, (kv_heads, -1))


def attention_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Sequence[range],
    k_positions: Sequence[range],
    q_documents: Tensor | None = None,
    k_documents: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropped: DroppedWeights | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, T, Hq, D] over a part of its keys, k and v [B, S, Hkv, D].

    Args:
        q_positions, k_positions: where queries and keys stand in their rows, as ranges that follow each other in the
            tensors. A query sees keys at its own position and before.
        q_documents, k_documents: int [B, T] and [B, S]; a query sees keys of its own document.
        window: how far a query sees, its own position included.
        scale: default D ** -0.5.
        dropped: weights that are dropped out after the softmax.
        compiled: fuse the steps between products by torch.compile.

    Returns:
        out [B, T, Hq, D] and the log-sum-exp of the scores [B, Hq, T], both at least fp32; a query that sees nothing of
        this part has zeros and -inf. Not differentiable by itself: see `attention_part_backward`.

    Raises ModelError where shapes and positions do not fit.
    """
    check_part(q, k, v, q_positions, k_positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if _is_empty(q):
        return q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)
    areas = rectangles(q_positions, k_positions, window)
    if q_documents is None and dropped is None and flash.is_usable(q, areas):
        return flash.forward(q, k, v, areas, window, scale)
    kernel = _compiled(_forward_block) if compiled else _forward_block
    queries, keys, values = _heads_first(q, k.shape[2]), _heads_first(k), _heads_first(v)
    kv_heads = k.shape[2]
    out = torch.zeros(queries.shape, dtype=wide, device=q.device)
    lse = torch.full(queries.shape[:-1], -math.inf, dtype=wide, device=q.device)
    areas = rectangles(q_positions, k_positions, window, Q_BLOCK, K_BLOCK)
    for (q0, q1), pairs in block_pairs(areas, q_documents, k_documents).items():
        rows = queries[:, :, :, q0:q1].contiguous()
        state = (
            torch.zeros(rows.shape, dtype=wide, device=q.device),
            torch.full((*rows.shape[:-1], 1), -math.inf, dtype=wide, device=q.device),
            torch.zeros((*rows.shape[:-1], 1), dtype=wide, device=q.device),
        )
        for pair in pairs:
            inside = slice(pair.area.k0, pair.area.k1)
            mask = pair_mask(pair, window, q_documents, k_documents, q.device)
            factor = None if dropped is None else dropped.factor(pair.area, kv_heads, wide)
            state = kernel(rows, keys[:, :, inside], values[:, :, inside], mask, factor, *state, scale)
        total, highest, sums = state
        out[:, :, :, q0:q1] = total / (sums + (sums == 0))
        lse[:, :, :, q0:q1] = (highest + sums.log()).squeeze(-1)
    return out.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2)


def attention_part_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    q_positions: Sequence[range],
    k_positions: Sequence[range],
    q_documents: Tensor | None = None,
    k_documents: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropped: DroppedWeights | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients of q, k and v, in their shapes and at least fp32.

    out [B, T, Hq, D] and lse [B, Hq, T] are those over *all* keys (of all parts joined by `merge_parts`), grad_out
    [B, T, Hq, D] is the gradient of that out; the rest is as in the forward pass. The gradient of q is the sum of the
    shares of all parts.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if _is_empty(q):
        return (q.new_empty(q.shape, dtype=wide), k.new_empty(k.shape, dtype=wide), v.new_empty(v.shape, dtype=wide))
    areas = rectangles(q_positions, k_positions, window)
    if q_documents is None and dropped is None and flash.is_usable(q, areas):
        return flash.backward(grad_out, q, k, v, out, lse, areas, window, scale)
    kernel = _compiled(_backward_block) if compiled else _backward_block
    kv_heads = k.shape[2]
    queries, keys, values = _heads_first(q, kv_heads), _heads_first(k), _heads_first(v)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).unflatten(1, (kv_heads, -1)).unsqueeze(-1)
    grads = _heads_first(grad_out.to(q.dtype), kv_heads)
    # A row that saw nothing has -inf here; +inf makes all of its weights zero, where -inf would make them NaN.
    lse = torch.where(lse == -math.inf, math.inf, lse).unflatten(1, (kv_heads, -1)).unsqueeze(-1)
    grad_q = torch.zeros(queries.shape, dtype=wide, device=q.device)
    grad_k, grad_v = (torch.zeros(keys.shape, dtype=wide, device=q.device) for _ in range(2))
    areas = rectangles(q_positions, k_positions, window, Q_BLOCK, K_BLOCK)
    for (q0, q1), pairs in block_pairs(areas, q_documents, k_documents).items():
        row = slice(q0, q1)
        rows, row_grads, row_delta, row_lse = (x[:, :, :, row].contiguous() for x in (queries, grads, delta, lse))
        for pair in pairs:
            inside = slice(pair.area.k0, pair.area.k1)
            mask = pair_mask(pair, window, q_documents, k_documents, q.device)
            factor = None if dropped is None else dropped.factor(pair.area, kv_heads, wide)
            block = (keys[:, :, inside], values[:, :, inside], mask, factor)
            shares = kernel(rows, row_grads, row_delta, row_lse, *block, scale)
            grad_q[:, :, :, row] += shares[0]
            grad_k[:, :, inside] += shares[1]
            grad_v[:, :, inside] += shares[2]
    return grad_q.flatten(1, 2).transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _is_empty(x: Tensor) -> bool:
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def _heads_first(x: Tensor, kv_heads: int | None = None) -> Tensor:
    """[B, T, H, D] as contiguous [B, H, T, D], or [B, kv_heads, H / kv_heads, T, D]; free where it lies so already."""
    x = x.transpose(1, 2).contiguous()
    return x if kv_heads is None else x.unflatten(1, (kv_heads, -1))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    scores = (q.flatten(2, 3) @ k.transpose(-1, -2)).to(wide) * scale
    scores = scores.unflatten(2, q.shape[2:4])
    return scores if mask is None else torch.where(mask, scores, -math.inf)


def _forward_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    total: Tensor,
    highest: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of the online softmax: q [B, Hkv, G, T, D], k and v [B, Hkv, S, D].

    total [B, Hkv, G, T, D] is the sum of values weighted by exp(score - highest), sums [B, Hkv, G, T, 1] that of the
    weights.
    """
    scores = _scores(q, k, mask, scale, total.dtype)
    peak = torch.maximum(highest, scores.amax(-1, keepdim=True))
    safe = peak.clamp_min(torch.finfo(peak.dtype).min)
    weights = torch.exp(scores - safe).to(q.dtype)
    shrink = torch.exp(highest - safe)
    used = weights if factor is None else (weights * factor).to(q.dtype)
    more = (used.flatten(2, 3) @ v).unflatten(2, q.shape[2:4])
    return total * shrink + more, peak, sums * shrink + weights.to(total.dtype).sum(-1, keepdim=True)


def _backward_block(
    q: Tensor,
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block's share of the gradients of q, k and v, in the dtype of q; shapes as in `_forward_block`."""
    scores = _scores(q, k, mask, scale, lse.dtype)
    weights = torch.exp(scores - lse)
    rows = grad.flatten(2, 3)
    grad_weights = (rows @ v.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    used = weights
    if factor is not None:
        used, grad_weights = weights * factor, grad_weights * factor
    grad_scores = (weights * (grad_weights - delta) * scale).to(q.dtype).flatten(2, 3)
    grad_q = (grad_scores @ k).unflatten(2, q.shape[2:4])
    grad_v = used.to(q.dtype).flatten(2, 3).transpose(-1, -2) @ rows
    return grad_q, grad_scores.transpose(-1, -2) @ q.flatten(2, 3), grad_v


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(function, dynamic=True)
