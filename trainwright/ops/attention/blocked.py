"""Causal attention for the CPU: blocks of queries against the keys they may see, written for the compiler.

The scheme is FlashAttention's (Dao et al. 2022, arXiv 2205.14135) with blocks large enough for oneDNN. The blocks are
plain torch with static bounds, so that torch.compile turns all that stands between two matrix products into one
vectorised loop, and causal or windowed blocks that hold nothing are never computed: at T = 512 with blocks of 128,
62 % of the square remains.

Up to `KEEP_WEIGHTS_UP_TO` tokens the backward pass reads the weights that the forward pass rounded to bf16 anyway;
longer sequences keep two numbers of each row and compute the weights again. What is left of T^2 then is the mask,
half a byte for each pair of positions, shared by all heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainwright.ops.attention.masking import attention_mask

__all__ = ["DEFAULT_BLOCK", "KEEP_WEIGHTS_UP_TO", "blocked_attention"]

# Measured on 2 cores (AVX-512 bf16, 1 MiB L2 each) at 8x8x512x64, forward + backward compiled: 64: 39.5 ms, 128: 37.7,
# 256: 39.9, 512: 49.3; torch's flash kernel: 102.
DEFAULT_BLOCK = 128
# Kept weights are about heads * T * 1.25 bytes a token and layer in bf16: a quarter more activations at T = 512,
# width 512. They save one of five matrix products and all exponentials of the backward pass.
KEEP_WEIGHTS_UP_TO = 512


class _Block(NamedTuple):
    q0: int
    q1: int
    k0: int
    k1: int


class _Options(NamedTuple):
    scale: float
    causal: bool
    window: int | None
    block: int


def _blocks(length: int, options: _Options) -> list[_Block]:
    """Rows of blocks: queries [q0, q1) need keys [k0, k1) and no others; k0 is a multiple of `block`."""
    rows, block, window = [], options.block, options.window
    for q0 in range(0, length, block):
        q1 = min(q0 + block, length)
        k0 = 0 if window is None else max(0, q0 - window + 1) // block * block
        rows.append(_Block(q0, q1, k0, q1 if options.causal else length))
    return rows


class _BlockedAttention(torch.autograd.Function):
    """q [B, Hkv, G, T, D], k and v [B, Hkv, T, D]; G query heads share a key-value head: rows of one product."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        document_ids: Tensor | None,
        key_mask: Tensor | None,
        options: _Options,
    ) -> Tensor:
        outs, totals, highests, kept = [], [], [], []
        for rows in _blocks(q.shape[3], options):
            scores = _scores(q, k, rows, document_ids, key_mask, options)
            highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
            weights = torch.exp(scores - highest).to(q.dtype)
            total = weights.to(scores.dtype).sum(-1, keepdim=True)
            total = total + (total == 0)  # a query that may see nothing gives zeros, not NaN
            out = _product(weights, v[:, :, rows.k0 : rows.k1])
            outs.append((out.to(scores.dtype) / total).to(q.dtype))
            totals.append(total)
            highests.append(highest)
            kept.append(weights)
        out, total = torch.cat(outs, 3), torch.cat(totals, 3)
        ctx.options = options
        if q.shape[3] <= KEEP_WEIGHTS_UP_TO:
            ctx.save_for_backward(q, k, v, out, total, None, document_ids, key_mask, *kept)
        else:
            ctx.save_for_backward(q, k, v, out, total, torch.cat(highests, 3), document_ids, key_mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, highest, document_ids, key_mask, *kept = ctx.saved_tensors
        options = ctx.options
        scale, block, length = options.scale, options.block, q.shape[3]
        wide = total.dtype
        # Weights stay unnormalised: what multiplies them is divided by the row total instead, D numbers and not T.
        grads = grad_out.to(wide) / total
        delta = (grads * out.to(wide)).sum(-1, keepdim=True)
        grads = grads.to(q.dtype)
        queries = q if kept else _computed_after(q, grads)
        grad_q_rows: list[Tensor] = []
        # The share of each row of blocks in the gradient of each block of keys; summed at the end in one pass.
        grad_k_parts: list[list[Tensor]] = [[] for _ in range(0, length, block)]
        grad_v_parts: list[list[Tensor]] = [[] for _ in range(0, length, block)]
        for index, rows in enumerate(_blocks(length, options)):
            inside = slice(rows.q0, rows.q1)
            if kept:
                weights = kept[index]
            else:
                scores = _scores(queries, k, rows, document_ids, key_mask, options)
                weights = torch.exp(scores - highest[:, :, :, inside]).to(q.dtype)
            keys, values, row_grads = k[:, :, rows.k0 : rows.k1], v[:, :, rows.k0 : rows.k1], grads[:, :, :, inside]
            grad_weights = _product(row_grads, values.transpose(-1, -2)).to(wide)
            grad_scores = (weights.to(wide) * (grad_weights - delta[:, :, :, inside])).to(q.dtype)
            grad_q_rows.append((_product(grad_scores, keys).to(wide) * scale).to(q.dtype))
            grad_k = grad_scores.flatten(2, 3).transpose(-1, -2) @ q[:, :, :, inside].flatten(2, 3)
            grad_v = weights.flatten(2, 3).transpose(-1, -2) @ row_grads.flatten(2, 3)
            for start in range(rows.k0, rows.k1, block):
                part = slice(start - rows.k0, min(start + block, rows.k1) - rows.k0)
                grad_k_parts[start // block].append(grad_k[:, :, part])
                grad_v_parts[start // block].append(grad_v[:, :, part])
        grad_k, grad_v = _sum_parts(grad_k_parts, scale, wide, k.dtype), _sum_parts(grad_v_parts, 1.0, wide, v.dtype)
        return torch.cat(grad_q_rows, 3), grad_k, grad_v, None, None, None


def _computed_after(value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, in a way that the compiler must wait for `gradient` (where a NaN would make all useless anyway).

    torch.compile sees forward and backward as one graph and runs in the forward whatever needs no gradient, which would
    bring back, and keep in memory, all the weights. Adding 0 * gradient does not help: the compiler folds it away.
    """
    return torch.where(torch.isnan(gradient), gradient, value) if torch.compiler.is_compiling() else value


def _scores(
    q: Tensor,
    k: Tensor,
    rows: _Block,
    document_ids: Tensor | None,
    key_mask: Tensor | None,
    options: _Options,
) -> Tensor:
    """Scaled scores of one row of blocks in fp32, [B, Hkv, G, queries, keys]; -inf where the mask forbids."""
    scores = _product(q[:, :, :, rows.q0 : rows.q1], k[:, :, rows.k0 : rows.k1].transpose(-1, -2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * options.scale
    mask = attention_mask(
        (rows.q0, rows.q1),
        (rows.k0, rows.k1),
        offset=0,
        device=q.device,
        causal=options.causal,
        window=options.window,
        document_ids=document_ids,
        key_mask=key_mask,
    )
    return scores if mask is None else torch.where(mask[:, None, None], scores, float("-inf"))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, G, M, K] x [B, H, K, N] -> [B, H, G, M, N] as one batched product over B x H."""
    shape = left.shape
    return (left.flatten(2, 3) @ right).view(*shape[:4], right.shape[-1])


def _sum_parts(parts: list[list[Tensor]], factor: float, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    """One gradient from its shares: summed block by block in `wide`, scaled, joined along the keys."""
    sums = []
    for shares in parts:
        total = shares[0].to(wide)
        for share in shares[1:]:
            total = total + share.to(wide)
        sums.append((total * factor).to(dtype))
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
    """Attention of [B, T, Hq, D] over [B, T, Hkv, D] (as many keys as queries), in blocks of `block` queries.

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
            _Options(scale, causal, window, block),
        )
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)
