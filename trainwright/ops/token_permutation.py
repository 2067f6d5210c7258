"""Copies of tokens in the order of their experts, and back: each token has k places, one for each of its experts.

Both directions are a gather forward and a gather backward, never an addition in an order that the device chooses, so
the result is the same every time. M is the number of copies that are sent: N * k, or fewer where some are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainwright.ops.contents import has_contents

__all__ = ["ExpertOrder", "count_choices", "gather_copies", "reorder_rows", "sort_by_expert", "spread_tokens"]


@dataclass(frozen=True)
class ExpertOrder:
    """Where the copies of tokens go.

    Attributes:
        copies: [M], the place n * k + i of each copy that is sent, in the order of experts.
        inverse: [N * k], where each place stands in `copies`; M for a copy that is dropped.
        counts: [E], copies of each expert.
        choices: k.
    """

    copies: Tensor
    inverse: Tensor
    counts: Tensor
    choices: int


def count_choices(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen along the last dimension of experts [..., C]: [..., num_experts] integers."""
    counts = torch.zeros(*experts.shape[:-1], num_experts, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(-1, experts, torch.ones_like(experts))


def sort_by_expert(experts: Tensor, num_experts: int, kept: Tensor | None = None) -> ExpertOrder:
    """The order of experts [N, k]; of equal experts the earlier token first. kept [N, k]: False where dropped.

    With `kept` the number of copies has to be known on the host, which waits for the device.
    """
    flat = experts.flatten()
    if kept is not None:
        flat = flat.masked_fill(~kept.flatten(), num_experts)
    copies = flat.argsort(stable=True)
    inverse = torch.empty_like(copies)
    inverse[copies] = torch.arange(copies.numel(), device=copies.device)
    counts = count_choices(flat, num_experts + 1)[:num_experts]
    if kept is not None and has_contents(flat):
        sent = int(counts.sum())
        copies, inverse = copies[:sent], inverse.clamp(max=sent)
    return ExpertOrder(copies, inverse, counts, experts.shape[1])


def spread_tokens(tokens: Tensor, order: ExpertOrder) -> Tensor:
    """Copies [M, D] of tokens [N, D] in the order of experts."""
    out: Tensor = _Spread.apply(tokens, order.copies, order.inverse, order.choices)
    return out


def gather_copies(copies: Tensor, order: ExpertOrder) -> Tensor:
    """Copies [M, D] back at the places of their tokens, [N, k, D]; zeros where one was dropped."""
    out: Tensor = _Gather.apply(copies, order.copies, order.inverse)
    return out.unflatten(0, (-1, order.choices))


def reorder_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows[order] for a permutation `order` with its inverse."""
    out: Tensor = _Gather.apply(rows, inverse, order)
    return out


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]; zeros where an index is one past the end."""
    if index.numel() > rows.shape[0]:
        rows = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
    return rows.index_select(0, index)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, copies: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return tokens.index_select(0, copies // choices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take(gradients[0], inverse).unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return _take(rows, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        return gradients[0].index_select(0, copies), None, None
