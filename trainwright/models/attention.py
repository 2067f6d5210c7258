"""The attention that every family calls: the fast operator, or a plain one where probabilities are dropped out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.models.cache import LayerCache
from trainwright.models.dropout import KeptWeights
from trainwright.ops.attention import attention

__all__ = ["SelfAttention", "attend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None,
    key_mask: Tensor | None,
    cache: LayerCache | None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kept: KeptWeights | None = None,
    backend: str = "auto",
    causal: bool = True,
) -> Tensor:
    """Attention of q [B, T, Hq, D] over k, v [B, T, Hkv, D] and what the cache holds; returns [B, T, Hq, D].

    causal: a token sees itself and those before it; without, all (then there is no cache and no window).
    document_ids [B, T] restricts each token to its own document; key_mask [B, S] (True = real token) hides padding.
    dropout is the probability of dropping an attention weight; above zero it costs a [B, Hq, T, T] matrix. kept says
    which weights stay (without a cache); None leaves it to torch's generator.
    backend is a name of `ops.attention.BACKENDS` or "auto"; without effect beside a cache or dropout.
    """
    if cache is not None:
        backend = "auto"
        k, v = cache.update(k, v)
        if key_mask is not None:
            key_mask = key_mask[:, -k.shape[1] :]
    if dropout > 0.0:
        allowed = _allowed(q, k, document_ids, key_mask, window, causal)
        if kept is not None and cache is None:
            return _attention_with_kept(q, k, v, allowed, scale, kept)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=allowed,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)
    return attention(
        q,
        k,
        v,
        document_ids=document_ids,
        window=window,
        scale=scale,
        key_mask=key_mask,
        backend=backend,
        causal=causal,
    )


class SelfAttention(nn.Module):
    """Base of every family's attention module: the two switches that they share.

    `attention_backend` is used where no cache is, in training and evaluation; decoding always chooses by itself.
    `attend` is what computes; who divides sequences over processes puts another function with its arguments there.
    """

    attention_backend: str = "auto"
    attend: Callable[..., Tensor] = staticmethod(attend)


def _allowed(
    q: Tensor, k: Tensor, document_ids: Tensor | None, key_mask: Tensor | None, window: int | None, causal: bool
) -> Tensor:
    """Which key each query may see, bool [B or 1, 1, T, S]."""
    query_index = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    key_index = torch.arange(k.shape[1], device=q.device)[None, :]
    allowed = key_index <= query_index if causal else (key_index >= 0) & (query_index >= 0)
    if window is not None:
        allowed = allowed & (key_index > query_index - window)
    allowed = allowed[None, None]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if key_mask is not None:
        allowed = allowed & (key_mask[:, None, None, :] | (key_index == query_index))
    return allowed


def _attention_with_kept(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None, kept: KeptWeights
) -> Tensor:
    """softmax(q k) v with the weights that `kept` names, the others zero; as `scaled_dot_product_attention` else."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]  # query heads that share a key head
    heads = q.transpose(1, 2).unflatten(1, (-1, groups))  # [B, Hkv, G, T, D]
    keys, values = k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]
    scores = (heads * scale) @ keys.transpose(-1, -2)
    weights = torch.softmax(scores.float().masked_fill(~allowed[:, :, None], -torch.inf), dim=-1)
    mask = kept.mask(q.shape[2]).unflatten(1, (-1, groups))
    weights = weights * mask * (1.0 / (1.0 - kept.p))
    return (weights.to(v.dtype) @ values).flatten(1, 2).transpose(1, 2)
