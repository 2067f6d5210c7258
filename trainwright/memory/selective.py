"""Which results a selectively recomputed block keeps: those that are dear to compute for the memory they take.

Kept: outputs of products with weights (linear layers, convolutions, fp8 products) and of fused attention kernels.
Computed again: norms, activations, gates, rotary embeddings, casts, dropout, and attention that is written out in plain
products (its scores take T^2 memory, which is what recomputing is for). After Korthikanti et al., arXiv 2205.05198,
section 5, with the boundary drawn by operator as torch.utils.checkpoint does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["KEPT_OPERATORS", "kept_operators", "observers", "selective_contexts"]

KEPT_OPERATORS = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.linear.default",
    "aten.convolution.default",
    "aten._scaled_mm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
    "higher_order.flex_attention",
)
"""Names below torch.ops; one that this torch does not have is left out."""

observers: list[Callable[[Any], None]] = []
"""Called with every result that is kept, outside the compiler: how `ActivationMeter` comes to know of it."""


def kept_operators() -> frozenset[Any]:
    """The operators of `KEPT_OPERATORS` that exist in this torch."""
    found = set()
    for name in KEPT_OPERATORS:
        operator: Any = torch.ops
        for part in name.split("."):
            operator = getattr(operator, part, None)
            if operator is None:
                break
        else:
            found.add(operator)
    return frozenset(found)


_KEPT = kept_operators()


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    if operator not in _KEPT:
        return CheckpointPolicy.PREFER_RECOMPUTE
    for observe in observers:
        observe(getattr(context, "op_output", None))  # torch before 2.13 does not show it
    return CheckpointPolicy.MUST_SAVE


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of torch.utils.checkpoint for one call of one block."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_policy)
    return contexts
