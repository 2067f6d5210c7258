"""Where the part of a tensor that this rank holds lies in the whole tensor: boxes, for any mesh and any sharding.

A plain tensor is one box, the whole. A `DTensor` on a one-dimensional mesh with `Shard(0)` is one box of rows, of
uneven size or empty; on meshes of more dimensions (FSDP2 with tensor parallelism) its part may be several boxes.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.base.errors import CheckpointError

__all__ = ["Box", "boxes_of", "is_sharded", "like_sharded", "local_boxes", "local_part", "narrow"]

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


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor. Asking does not import torch.distributed.tensor: without it there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of a plain one, the local shard of a DTensor (perhaps empty)."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        local: torch.Tensor = sharded.to_local()
    wait = getattr(local, "wait", None)  # the result of a collective that is still under way
    return wait() if wait is not None else local


def like_sharded(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor with the mesh, placements and global shape of `like` around another local part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor(local, like._spec, requires_grad=False)


def boxes_of(tensor: torch.Tensor, name: str) -> tuple[Box, ...]:
    """The boxes of the whole tensor that this rank holds; none where its part is empty.

    Raises:
        CheckpointError: the tensor holds partial sums, or its local part has not the shape that its layout says.
    """
    if not is_sharded(tensor):
        origin = (0,) * tensor.dim()
        return (Box(origin, tuple(tensor.shape), origin),) if tensor.numel() else ()
    layout: Any = tensor
    for placement in layout.placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise CheckpointError(
                f"tensor {name!r}: a DTensor with the placement {placement} cannot be saved or loaded",
                hint="redistribute it to Shard or Replicate first",
            )
    coordinate = layout.device_mesh.get_coordinate()
    local = tuple(local_part(tensor).shape)
    if coordinate is None:  # this rank is not in the mesh
        return ()
    shape, boxes = local_boxes(tuple(tensor.shape), tuple(layout.device_mesh.shape), coordinate, layout.placements)
    if shape != local:
        raise CheckpointError(
            f"tensor {name!r}: its local part has the shape {list(local)}, expected {list(shape)}: it is a tensor of "
            f"shape {list(tensor.shape)} with {layout.placements} on a mesh of {list(layout.device_mesh.shape)}"
        )
    return boxes


def local_boxes(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """(shape of the local part, its boxes) at a coordinate of a mesh. Pure; the rule is that of torch.chunk."""
    runs: list[Runs] = [[(0, size)] if size else [] for size in shape]
    for ranks, mine, placement in zip(mesh, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        # _StridedShard: another mesh dimension cut first, into `split_factor` pieces; each of them is cut here.
        pieces = int(getattr(placement, "split_factor", 1))
        whole = runs[placement.dim]
        runs[placement.dim] = [
            run for piece in range(pieces) for run in _part(_part(whole, pieces, piece), ranks, mine)
        ]
    local_shape = tuple(sum(count for _, count in dim) for dim in runs)
    starts = [list(itertools.accumulate((count for _, count in dim), initial=0)) for dim in runs]
    boxes = []
    for chosen in itertools.product(*(range(len(dim)) for dim in runs)):
        picked = [dim[i] for dim, i in zip(runs, chosen, strict=True)]
        at = tuple(dim[i] for dim, i in zip(starts, chosen, strict=True))
        boxes.append(Box(tuple(first for first, _ in picked), tuple(count for _, count in picked), at))
    return local_shape, tuple(boxes)


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
