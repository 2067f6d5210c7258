"""InfoNCE: a text's vector shall be nearer to its partner's than to those of all other texts at hand.

Van den Oord et al. 2018 (arXiv 1807.03748), with the other positives of the batch as negatives (Karpukhin et al. 2020,
arXiv 2004.04906). Texts that are equal are never each other's negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

__all__ = ["NO_TEXT", "Texts", "contrastive_loss", "gathered"]

NO_TEXT = 0  # the key of a place where no text stands
_NEVER = -1e30  # a finite minus infinity: rows that hold nothing else stay finite


@dataclass(frozen=True)
class Texts:
    """Vectors [N, D] of length 1, and int64 keys [N]: equal texts have equal keys, NO_TEXT is no text."""

    vectors: Tensor
    keys: Tensor


def contrastive_loss(
    anchors: Texts,
    positives: Texts,
    candidates: Texts,
    *,
    place: int,
    temperature: float,
    other_anchors: Texts | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over the anchors of -log softmax of their own positive among `candidates`, and how many anchors count.

    Args:
        anchors, positives: [B], one positive for each anchor. Anchors without text do not count.
        candidates: positives of all rows at hand, then given negatives; row `place + i` is the positive of anchor i.
        other_anchors: anchors of all rows at hand, anchor i at row `place + i`: the loss is then the mean of both
            directions (CLIP, arXiv 2103.00020).

    Returns:
        loss_sum: fp32 scalar (fp64 for fp64 vectors), count: int64 scalar.
    """
    known = (anchors.keys != NO_TEXT) & (positives.keys != NO_TEXT)
    losses = _direction(anchors.vectors, positives.keys, candidates, place, temperature)
    if other_anchors is not None:
        back = _direction(positives.vectors, anchors.keys, other_anchors, place, temperature)
        losses = (losses + back) / 2
    return torch.where(known, losses, 0.0).sum(), known.sum()


def _direction(queries: Tensor, partners: Tensor, candidates: Texts, place: int, temperature: float) -> Tensor:
    """Losses [B] of queries [B, D] whose partners' keys are partners [B]."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ candidates.vectors.to(wide).T / temperature
    own = torch.arange(len(queries), device=queries.device) + place
    is_own = own[:, None] == torch.arange(len(candidates.keys), device=queries.device)[None]
    same_text = partners[:, None] == candidates.keys[None]
    left_out = ((same_text & ~is_own) | (candidates.keys == NO_TEXT)[None]) & ~is_own
    return F.cross_entropy(scores.masked_fill(left_out, _NEVER), own, reduction="none")


class _Gather(torch.autograd.Function):
    """All ranks' rows, one rank behind the other; gradients of all ranks come home to the rows they are of."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        rows = len(total) // size
        return total[rank * rows : (rank + 1) * rows], None


def gathered(texts: Texts, group: Any) -> tuple[Texts, int]:
    """The texts of all ranks of a group, and where this rank's begin. All ranks bring as many rows.

    With every rank's loss summed, as the engine sums, the gradients are those of one process with all rows.
    """
    keys = [torch.empty_like(texts.keys) for _ in range(dist.get_world_size(group))]
    dist.all_gather(keys, texts.keys.contiguous(), group=group)
    vectors: Tensor = _Gather.apply(texts.vectors, group)
    return Texts(vectors, torch.cat(keys)), dist.get_rank(group) * len(texts.keys)
