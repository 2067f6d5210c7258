"""Ulysses: ranks exchange heads for positions, so that each sees whole sequences of some heads.

Jacobs et al., arXiv 2309.14509. Queries, keys and values travel as one all-to-all, the output as another; each rank
sends (u - 1) / u of what it holds. Key-value heads that the ranks do not divide are repeated until they do: with u
ranks and K heads lcm(u, K) of them travel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainwright.parallel.context.exchange import ContextGroup

__all__ = ["heads_to_positions", "positions_to_heads"]


def positions_to_heads(group: ContextGroup, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, Hq, D], k and v [B, T, Hkv, D] of some positions as [B, u * T, H / u, D] of some heads."""
    ranks = group.order.ulysses
    repeats = math.lcm(ranks, k.shape[2]) // k.shape[2]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    # [u, B, T, H / u, D] each: what goes to each rank lies together.
    parts = [x.unflatten(2, (ranks, -1)).movedim(2, 0) for x in (q, k, v)]
    received = group.exchange(torch.cat(parts, 3))
    whole = received.movedim(0, 1).flatten(1, 2)
    sizes = [part.shape[3] for part in parts]
    q, k, v = whole.split(sizes, 2)
    return q, k, v


def heads_to_positions(group: ContextGroup, out: Tensor) -> Tensor:
    """The way back: [B, u * T, H / u, D] of some heads as [B, T, H, D] of this rank's positions."""
    parts = out.unflatten(1, (group.order.ulysses, -1)).movedim(1, 0)
    return group.exchange(parts).movedim(0, 2).flatten(2, 3)
