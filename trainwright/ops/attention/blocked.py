"""Causal attention for the CPU: blocks of queries against the keys they may see, written for the compiler.

The scheme is FlashAttention's (Dao et al. 2022, arXiv 2205.14135): keep the logsumexp of each row, recompute the
weights in the backward pass, never hold the T x S scores. The blocks are plain torch with static bounds, so that
torch.compile turns all that stands between two matrix products into one vectorised loop, and causal or windowed
blocks that hold nothing are never
computed: at T = 512 with blocks of 128, 62 % of the square remains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainwright.ops.attention.masking import attention_mask

__all__ = ["DEFAULT_BLOCK", "blocked_attention"]

# Measured on 2 cores (EPYC, 1 MiB L2 each) at 8x8x512x64 bf16: see docs/benchmarks.md. Smaller blocks waste less
# above the diagonal, but their matrix products are too small for oneDNN.
DEFAULT_BLOCK = 128


class _Block(NamedTuple):
    q0: int
    q1: int
    k0: int
    k1: int


def _blocks(length: int, block: int, causal: bool, window: int | None) -> list[_Block]:
    """Rows of blocks: queries [q0, q1) need keys [k0, k1) and no others; k0 is a multiple of `block`."""
    rows = []
    for q0 in range(0, length, block):
        q1 = min(q0 + block, length)
        k0 = 0 if window is None else max(0, q0 - window + 1) // block * block
        rows.append(_Block(q0, q1, k0, q1 if causal else length))
    return rows


class _BlockedAttention(torch.autograd.Function):
    """q [B, Hkv, G, T, D], k and v [B, Hkv, T, D]; G query heads share a key-value head and become rows of one product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        document_ids: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        causal: bool,
        window: int | None,
        block: int,
    ) -> Tensor:
        outs, logsumexps = [], []
        for rows in _blocks(q.shape[3], block, causal, window):
            scores = _scores(q, k, rows, document_ids, key_mask, scale, causal, window)
            highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
            weights = torch.exp(scores - highest)
            total = weights.sum(-1, keepdim=True)
            total = total + (total == 0)  # a query that may see nothing gives zeros, not NaN
            values = v[:, :, rows.k0 : rows.k1]
            out = _product(weights.to(q.dtype), values)
            outs.append((out.to(scores.dtype) / total).to(q.dtype))
            logsumexps.append(highest + total.log())
        out, logsumexp = torch.cat(outs, 3), torch.cat(logsumexps, 3)
        ctx.save_for_backward(q, k, v, out, logsumexp, document_ids, key_mask)
        ctx.options = (scale, causal, window, block)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, logsumexp, document_ids, key_mask = ctx.saved_tensors
        scale, causal, window, block = ctx.options
        length = q.shape[3]
        wide = logsumexp.dtype
        delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        grad_q_rows: list[Tensor] = []
        # The share of each row of blocks in the gradient of each block of keys; summed at the end in one pass.
        grad_k_parts: list[list[Tensor]] = [[] for _ in range(0, length, block)]
        grad_v_parts: list[list[Tensor]] = [[] for _ in range(0, length, block)]
        for rows in _blocks(length, block, causal, window):
            queries, grads = q[:, :, :, rows.q0 : rows.q1], grad_out[:, :, :, rows.q0 : rows.q1].to(q.dtype)
            keys, values = k[:, :, rows.k0 : rows.k1], v[:, :, rows.k0 : rows.k1]
            scores = _scores(q, k, rows, document_ids, key_mask, scale, causal, window)
            weights = torch.exp(scores - logsumexp[:, :, :, rows.q0 : rows.q1])
            grad_weights = _product(grads, values.transpose(-1, -2)).to(wide)
            grad_scores = (weights * (grad_weights - delta[:, :, :, rows.q0 : rows.q1]) * scale).to(q.dtype)
            grad_q_rows.append(_product(grad_scores, keys))
            grad_k = grad_scores.flatten(2, 3).transpose(-1, -2) @ queries.flatten(2, 3)
            grad_v = weights.to(q.dtype).flatten(2, 3).transpose(-1, -2) @ grads.flatten(2, 3)
            for start in range(rows.k0, rows.k1, block):
                inside = slice(start - rows.k0, min(start + block, rows.k1) - rows.k0)
                grad_k_parts[start // block].append(grad_k[:, :, inside])
                grad_v_parts[start // block].append(grad_v[:, :, inside])
        grad_q = torch.cat(grad_q_rows, 3)
        return grad_q, _sum_parts(grad_k_parts, wide, k), _sum_parts(grad_v_parts, wide, v), *([None] * 6)


def _scores(
    q: Tensor,
    k: Tensor,
    rows: _Block,
    document_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Scaled scores of one row of blocks in fp32, [B, Hkv, G, queries, keys]; -inf where the mask forbids."""
    scores = _product(q[:, :, :, rows.q0 : rows.q1], k[:, :, rows.k0 : rows.k1].transpose(-1, -2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    mask = attention_mask(
        (rows.q0, rows.q1),
        (rows.k0, rows.k1),
        offset=0,
        device=q.device,
        causal=causal,
        window=window,
        document_ids=document_ids,
        key_mask=key_mask,
    )
    return scores if mask is None else torch.where(mask[:, None, None], scores, float("-inf"))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, G, M, K] x [B, H, K, N] -> [B, H, G, M, N] as one batched product over B x H."""
    shape = left.shape
    return (left.flatten(2, 3) @ right).view(*shape[:4], right.shape[-1])


def _sum_parts(parts: list[list[Tensor]], wide: torch.dtype, like: Tensor) -> Tensor:
    sums = []
    for shares in parts:
        total = shares[0].to(wide)
        for share in shares[1:]:
            total = total + share.to(wide)
        sums.append(total.to(like.dtype))
    return torch.cat(sums, 2)


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None,
    window: int | None,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    block: int = DEFAULT_BLOCK,
) -> Tensor:
    """Attention of [B, T, Hq, D] over [B, T, Hkv, D] (as many keys as queries), O(T x block) memory, exact gradients.

    Weights and scores meet matrix products in the dtype of q (bf16 or fp32); softmax statistics are fp32 (float64 for
    float64).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    queries = q.view(batch, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).contiguous()
    with torch.autocast(q.device.type, enabled=False):
        out = _BlockedAttention.apply(
            queries,
            k.transpose(1, 2).contiguous(),
            v.transpose(1, 2).contiguous(),
            document_ids,
            key_mask,
            scale,
            causal,
            window,
            block,
        )
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)
