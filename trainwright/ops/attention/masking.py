"""Who may look at whom: one rule, used by every attention backend.

Queries are the last T of S positions, so query t stands at position t + (S - T). It may attend key s when

- causal: s <= position;
- window w: position - s < w (a token sees itself and the w - 1 before it);
- documents: both carry the same document id (only when S == T);
- key_mask: the key is not padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.base.errors import ModelError

__all__ = ["attention_mask", "autocast_inputs", "check_arguments"]


def attention_mask(
    query_range: tuple[int, int],
    key_range: tuple[int, int],
    *,
    offset: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    document_ids: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor | None:
    """Boolean mask [1 or B, queries, keys] (True = may attend) of one rectangle of the score matrix, or None if all
    may.

    Ranges are half-open; offset is S - T. Rectangles on which the static rules (causal, window) allow everything cost
    nothing.
    """
    (q0, q1), (k0, k1) = query_range, key_range
    mask: Tensor | None = None
    crosses_diagonal = causal and k1 - 1 > q0 + offset
    crosses_window = window is not None and (q1 - 1 + offset) - k0 >= window
    if crosses_diagonal or crosses_window:
        distance = torch.arange(q0 + offset, q1 + offset, device=device)[:, None] - torch.arange(k0, k1, device=device)
        if crosses_diagonal:
            mask = distance >= 0
        if crosses_window and window is not None:
            near = distance < window
            mask = near if mask is None else mask & near
        assert mask is not None
        mask = mask[None]
    if document_ids is not None:
        same = document_ids[:, q0:q1, None] == document_ids[:, None, k0:k1]
        mask = same if mask is None else mask & same
    if key_mask is not None:
        present = key_mask[:, None, k0:k1]
        mask = present.expand(-1, q1 - q0, -1) if mask is None else mask & present
    return mask


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the autocast dtype where autocast is on, as torch's own attention takes them; float64 stays."""
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or q.dtype == torch.float64:  # autocast knows no meta
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    document_ids: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    """Raise ModelError when shapes or options do not fit; q [B, T, Hq, D], k and v [B, S, Hkv, D]."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ModelError(
            f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            hint="q is [batch, queries, heads, head_dim]; k and v are [batch, keys, kv_heads, head_dim]",
        )
    if heads % kv_heads:
        raise ModelError(
            f"{heads} query heads cannot share {kv_heads} key-value heads", hint="heads must be a multiple"
        )
    if keys < length:
        raise ModelError(
            f"attention got {length} queries but only {keys} keys", hint="keys include those of the queries"
        )
    if document_ids is not None and (keys != length or tuple(document_ids.shape) != (batch, length)):
        raise ModelError(
            f"document_ids {tuple(document_ids.shape)} with {length} queries and {keys} keys",
            hint="document_ids is [batch, queries] and works without a KV cache (keys == queries)",
        )
    if key_mask is not None and tuple(key_mask.shape) != (batch, keys):
        raise ModelError(f"key_mask {tuple(key_mask.shape)}, expected {(batch, keys)}", hint="one flag for each key")
    if window is not None and (window < 1 or not causal):
        raise ModelError(f"window={window} with causal={causal}", hint="a window is >= 1 and needs causal attention")
