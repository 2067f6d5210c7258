"""Attention in plain torch: the fp32 reference, and the grouped form that decoding with a KV cache uses."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.ops.attention.masking import attention_mask, check_arguments

__all__ = ["attention_reference", "grouped_attention"]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "reference",
    causal: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The definition, at least in fp32, holding all scores: softmax(q k^T * scale + mask) v. Same arguments as
    `attention`.

    A query that may attend nothing gives zeros.
    """
    check_arguments(q, k, v, causal=causal, window=window, document_ids=document_ids, key_mask=key_mask)
    del backend
    length, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).transpose(1, 2)
    all_keys = k.to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    values = v.to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    with torch.autocast(q.device.type, enabled=False):
        scores = queries @ all_keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        mask = attention_mask(
            (0, length),
            (0, keys),
            offset=keys - length,
            device=q.device,
            causal=causal,
            window=window,
            document_ids=document_ids,
            key_mask=key_mask,
        )
        if mask is None:
            weights = scores.softmax(-1)
        else:
            mask = mask[:, None]
            blind = ~mask.any(-1, keepdim=True)
            weights = scores.masked_fill(~(mask | blind), float("-inf")).softmax(-1).masked_fill(blind, 0.0)
        return (weights @ values).transpose(1, 2).to(q.dtype)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None,
    window: int | None,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
) -> Tensor:
    """Attention of few queries over many keys, [B, T, Hq, D] over [B, S, Hkv, D]: keys and values are read once,
    never repeated.

    The queries that share a key-value head become rows of one matrix product. Scores are held whole, so it is for T
    << S (decoding) and for short sequences. Differentiable by autograd.
    """
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    rows = (
        q.view(batch, length, kv_heads, groups, dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, groups * length, dim)
    )
    scores = rows @ k.permute(0, 2, 3, 1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    mask = attention_mask(
        (0, length),
        (0, keys),
        offset=keys - length,
        device=q.device,
        causal=causal,
        window=window,
        document_ids=document_ids,
        key_mask=key_mask,
    )
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        shaped = scores.view(batch, kv_heads, groups, length, keys)
        shaped = shaped.masked_fill(~(mask | blind)[:, None, None], float("-inf")).softmax(-1)
        weights = shaped.masked_fill(blind[:, None, None], 0.0).view(batch, kv_heads, groups * length, keys)
    else:
        weights = scores.softmax(-1)
    out = weights.to(q.dtype) @ v.transpose(1, 2)
    return out.view(batch, kv_heads, groups, length, dim).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)
