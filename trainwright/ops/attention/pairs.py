"""Which blocks of a score matrix hold anything: queries and keys at known positions, in runs of consecutive ones.

A rank of a ring holds pieces of a sequence that do not touch each other, so its queries and keys are described by
ranges: `(range(0, 64), range(448, 512))` are 128 tokens. What they may see of each other under causal order and window
is then known without looking at any tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.base.errors import ModelError

__all__ = ["BlockPair", "Rectangle", "block_pairs", "check_part", "pair_mask", "rectangles"]


class Rectangle(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1), as indices into their tensors; the first stand at q_first and k_first.

    free: all of these queries may see all of these keys, as far as order and window say.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    q_first: int
    k_first: int
    free: bool


class BlockPair(NamedTuple):
    """One block of scores that holds something. by_document: some, but not all, of it is forbidden by documents."""

    area: Rectangle
    by_document: bool


def check_part(q: Tensor, k: Tensor, v: Tensor, q_positions: Sequence[range], k_positions: Sequence[range]) -> None:
    """Raise ModelError when tensors [B, T, H, D] and positions do not fit each other."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or heads % kv_heads:
        raise ModelError(
            f"attention_part got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            hint="q is [batch, queries, heads, head_dim]; k and v are [batch, keys, kv_heads, head_dim]",
        )
    for name, tensor, runs in (("queries", q, q_positions), ("keys", k, k_positions)):
        if sum(map(len, runs)) != tensor.shape[1] or any(run.step != 1 for run in runs):
            raise ModelError(
                f"{tensor.shape[1]} {name} and positions {list(runs)}",
                hint="one position each, in ranges of step 1",
            )


def rectangles(
    q_positions: Sequence[range],
    k_positions: Sequence[range],
    window: int | None,
    q_block: int | None = None,
    k_block: int | None = None,
) -> list[Rectangle]:
    """All pairs of runs, cut into blocks of at most q_block x k_block, that hold anything; row by row."""
    found = []
    for q0, queries in _cut(q_positions, q_block):
        for k0, keys in _cut(k_positions, k_block):
            if keys[0] > queries[-1] or (window is not None and queries[0] - keys[-1] >= window):
                continue
            free = keys[-1] <= queries[0] and (window is None or queries[-1] - keys[0] < window)
            found.append(Rectangle(q0, q0 + len(queries), k0, k0 + len(keys), queries[0], keys[0], free))
    return found


def block_pairs(
    areas: Sequence[Rectangle], q_documents: Tensor | None, k_documents: Tensor | None
) -> dict[tuple[int, int], list[BlockPair]]:
    """The blocks by the queries (q0, q1) that they belong to, those without a common document left out.

    Looks at document ids [B, T] and [B, S] once, which on a GPU is a wait. Exact where the ids of a row ascend (as
    those of packed rows do); otherwise no block that holds something is left out.
    """
    rows: dict[tuple[int, int], list[BlockPair]] = {}
    if q_documents is None or k_documents is None:
        for area in areas:
            rows.setdefault((area.q0, area.q1), []).append(BlockPair(area, False))
        return rows
    lows, highs = zip(*(_extent(q_documents, area.q0, area.q1) for area in areas), strict=True) if areas else ((), ())
    for area, meets in zip(areas, _meetings(areas, lows, highs, k_documents), strict=True):
        if meets:
            rows.setdefault((area.q0, area.q1), []).append(BlockPair(area, meets == 1))
    return rows


def pair_mask(
    pair: BlockPair, window: int | None, q_documents: Tensor | None, k_documents: Tensor | None, device: torch.device
) -> Tensor | None:
    """Who may see whom inside one block: bool [1 or B, 1, 1, queries, keys]; None where all may."""
    area = pair.area
    mask: Tensor | None = None
    if not area.free:
        places = torch.arange(area.q_first, area.q_first + area.q1 - area.q0, device=device)
        distance = places[:, None] - torch.arange(area.k_first, area.k_first + area.k1 - area.k0, device=device)
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None]
    if pair.by_document:
        assert q_documents is not None
        assert k_documents is not None
        same = q_documents[:, area.q0 : area.q1, None] == k_documents[:, None, area.k0 : area.k1]
        mask = same if mask is None else mask & same
    return None if mask is None else mask[:, None, None]


def _cut(runs: Sequence[range], block: int | None) -> list[tuple[int, range]]:
    """Runs as (index of the first, positions), each cut into equal pieces (by at most one) no longer than `block`."""
    pieces, index = [], 0
    for run in runs:
        count = 1 if block is None else -(-len(run) // block)
        for number in range(count):
            piece = run[len(run) * number // count : len(run) * (number + 1) // count]
            pieces.append((index, piece))
            index += len(piece)
    return [(at, piece) for at, piece in pieces if len(piece)]


def _extent(documents: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    inside = documents[:, begin:end]
    return inside.amin(1), inside.amax(1)


def _meetings(areas: Sequence[Rectangle], lows: Sequence[Tensor], highs: Sequence[Tensor], keys: Tensor) -> list[int]:
    """For each block 0 (no document in common), 2 (a single document) or 1; one transfer for all of them."""
    if not areas:
        return []
    low, high = torch.stack(tuple(lows)), torch.stack(tuple(highs))
    key_low, key_high = (torch.stack(ends) for ends in zip(*(_extent(keys, a.k0, a.k1) for a in areas), strict=True))
    some = ((low <= key_high) & (key_low <= high)).any(1)
    one = ((low == high) & (key_low == key_high) & (low == key_low)).all(1)
    return (some.int() + (some & one).int()).tolist()
