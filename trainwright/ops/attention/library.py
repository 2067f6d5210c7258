"""Attention by torch's own kernels: scaled_dot_product_attention everywhere, flex_attention on CUDA."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.ops.attention.masking import attention_mask

__all__ = ["flex_attention", "sdpa_attention"]


def sdpa_attention(
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
    """torch's scaled_dot_product_attention; a boolean mask [B or 1, 1, T, S] is built only where `is_causal` does not
    say it.
    """
    length, keys = q.shape[1], k.shape[1]
    simple = document_ids is None and key_mask is None and (window is None or window >= keys)
    plain_causal = simple and causal and length == keys
    mask: Tensor | None = None
    if not plain_causal:
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
    blind = None
    if mask is not None:
        mask = mask[:, None]
        if (
            key_mask is not None
        ):  # only padding can leave a query without any key; kernels differ in what they then give
            blind = ~mask.any(-1, keepdim=True)
            mask = mask | blind
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _flex_functions(compiled: bool) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

    return (torch.compile(torch_flex_attention, dynamic=False) if compiled else torch_flex_attention), create_block_mask


def flex_attention(
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
    """torch's flex_attention: skips the blocks that documents and window leave empty. Compiled on CUDA, plain
    elsewhere.

    Inside a compiled block torch inlines it; outside, it is compiled here, because the plain form holds all scores.
    """
    compiled = q.is_cuda and not torch.compiler.is_compiling()
    attend, create_block_mask = _flex_functions(compiled)
    length, keys = q.shape[1], k.shape[1]
    offset = keys - length

    def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        inside = s <= t + offset if causal else s >= 0
        if window is not None:
            inside = inside & (t + offset - s < window)
        if document_ids is not None:
            inside = inside & (document_ids[b, t] == document_ids[b, s])
        if key_mask is not None:
            inside = inside & key_mask[b, s]
        return inside

    per_row = document_ids is not None or key_mask is not None
    block_mask = create_block_mask(allowed, q.shape[0] if per_row else None, None, length, keys, device=str(q.device))
    out = attend(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
