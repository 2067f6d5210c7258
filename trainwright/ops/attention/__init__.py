"""Attention: one function, several backends, one mask rule. `attention_reference` is what all of them are tested
against.
"""

from __future__ import annotations

from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.ops.attention.blocked import blocked_attention
from trainwright.ops.attention.choose import (
    BACKENDS,
    BackendChoice,
    check_backend,
    choose_backend,
)
from trainwright.ops.attention.library import flex_attention, sdpa_attention
from trainwright.ops.attention.masking import autocast_inputs, check_arguments
from trainwright.ops.attention.merge import merge_parts
from trainwright.ops.attention.partial import DroppedWeights, attention_part, attention_part_backward
from trainwright.ops.attention.plain import attention_reference, grouped_attention

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "DroppedWeights",
    "attention",
    "attention_part",
    "attention_part_backward",
    "attention_reference",
    "autocast_inputs",
    "choose_backend",
    "merge_parts",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    causal: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of q [B, T, Hq, D] over k, v [B, S, Hkv, D]; gives [B, T, Hq, D] in the dtype of q.

    S >= T; the queries are the last T of the S positions (KV cache). Hq is a multiple of Hkv (grouped-query attention).
    document_ids: int [B, T]; tokens attend only inside their document (S == T). window: tokens seen, own one included.
    key_mask: bool [B, S], False for padding. scale: default D ** -0.5. backend: "auto" or one of BACKENDS.
    Under torch.autocast, fp32 inputs are rounded to the autocast dtype, as torch's own attention does.
    Raises ModelError when shapes do not fit or the backend cannot do what is asked.
    """
    check_arguments(q, k, v, causal=causal, window=window, document_ids=document_ids, key_mask=key_mask)
    device_type = q.device.type
    q, k, v = autocast_inputs(q, k, v)
    length, keys = q.shape[1], k.shape[1]
    if window is not None and window >= keys:
        window = None
    if backend == "auto":
        backend = choose_backend(
            device_type,
            query_length=length,
            key_length=keys,
            causal=causal,
            documents=document_ids is not None,
            window=window,
            key_mask=key_mask is not None,
            dtype=q.dtype,
        ).name
    check_backend(backend)
    if backend == "reference":
        return attention_reference(
            q, k, v, document_ids=document_ids, window=window, scale=scale, causal=causal, key_mask=key_mask
        )
    if backend == "blocked" and length != keys:
        raise ModelError(
            f"the blocked backend got {length} queries and {keys} keys", hint="with a KV cache use auto or grouped"
        )
    run = {
        "grouped": grouped_attention,
        "blocked": blocked_attention,
        "sdpa": sdpa_attention,
        "flex": flex_attention,
    }[backend]
    return run(
        q,
        k,
        v,
        document_ids=document_ids,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
        key_mask=key_mask,
    )
