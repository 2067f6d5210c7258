"""Where the part of a tensor that a rank holds lies in the whole tensor: boxes, for any mesh and any sharding. Pure.

One dimension of a mesh that cuts rows gives one box of rows, of uneven size or empty; on meshes of more dimensions
(FSDP2 over tensor parallelism) the part of a rank may be several boxes. The rule is that of torch.chunk.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Box", "cut", "local_boxes", "narrow", "paste"]

Runs = list[tuple[int, int]]
"""Positions along one dimension, in the order in which the rank holds them: (first, count) of each unbroken run."""


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor that begins at `offset`; in the rank's part it begins at `at`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def local_boxes(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """(shape of the local part, its boxes) at a coordinate of a mesh; `placements` are those of a DTensor."""
    return _local_boxes(tuple(shape), tuple(mesh), tuple(coordinate), tuple(placements))


@functools.lru_cache(maxsize=1 << 14)
def _local_boxes(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    runs: list[Runs] = [[(0, size)] if size else [] for size in shape]
    for i, dim, pieces in _cuts(mesh, placements):
        whole = runs[dim]
        runs[dim] = [
            run for piece in range(pieces) for run in _part(_part(whole, pieces, piece), mesh[i], coordinate[i])
        ]
    local_shape = tuple(sum(count for _, count in dim) for dim in runs)
    starts = [list(itertools.accumulate((count for _, count in dim), initial=0)) for dim in runs]
    boxes = []
    for chosen in itertools.product(*(range(len(dim)) for dim in runs)):
        picked = [dim[i] for dim, i in zip(runs, chosen, strict=True)]
        at = tuple(dim[i] for dim, i in zip(starts, chosen, strict=True))
        boxes.append(Box(tuple(first for first, _ in picked), tuple(count for _, count in picked), at))
    return local_shape, tuple(boxes)


def _cuts(mesh: tuple[int, ...], placements: tuple[Any, ...]) -> list[tuple[int, int, int]]:
    """(mesh dimension, tensor dimension, pieces that are cut each for itself), in the order in which cuts are made.

    FSDP2 cuts what tensor parallelism left to a rank, but stands before it in the mesh. Its placement says so
    (`_StridedShard`: later dimensions of the mesh make `split_factor` pieces, and each of them is cut); taken in that
    order, sizes that do not divide come out as they are in memory, too.
    """
    cuts: list[tuple[int, int, int]] = []
    last: list[tuple[int, int, int]] = []
    for i, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        pieces = int(getattr(placement, "split_factor", 1))
        later = [j for j in range(i + 1, len(mesh)) if getattr(placements[j], "dim", None) == placement.dim]
        if pieces > 1 and math.prod(mesh[j] for j in later) == pieces:
            last.insert(0, (i, placement.dim, 1))
        else:
            cuts.append((i, placement.dim, pieces))
    return cuts + last


def _part(runs: Runs, parts: int, index: int) -> Runs:
    """The index-th of `parts` pieces as torch.chunk cuts them: equal ones, then a shorter one, then empty ones."""
    total = sum(count for _, count in runs)
    size = -(-total // parts)
    low, high = min(total, size * index), min(total, size * (index + 1))
    result: Runs = []
    position = 0
    for first, count in runs:
        start, stop = max(low, position), min(high, position + count)
        if start < stop:
            begin = first + start - position
            if result and sum(result[-1]) == begin:
                result[-1] = (result[-1][0], result[-1][1] + stop - start)
            else:
                result.append((begin, stop - start))
        position += count
    return result


def narrow(tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The box of a tensor that begins at `offset`, as a view."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def cut(whole: torch.Tensor, shape: Sequence[int], boxes: Sequence[Box]) -> torch.Tensor:
    """The part of shape `shape` that `boxes` make up, out of the whole tensor: a view where it is one box."""
    if len(boxes) == 1:
        return narrow(whole, boxes[0].offset, boxes[0].shape)
    part = whole.new_empty(tuple(shape))
    for box in boxes:
        narrow(part, box.at, box.shape).copy_(narrow(whole, box.offset, box.shape))
    return part


def paste(part: torch.Tensor, whole: torch.Tensor, boxes: Sequence[Box]) -> None:
    """The inverse of `cut`: write a part into its boxes of the whole tensor."""
    for box in boxes:
        narrow(whole, box.offset, box.shape).copy_(narrow(part, box.at, box.shape))
