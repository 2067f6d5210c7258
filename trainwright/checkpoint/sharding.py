"""Where the part of a tensor that this rank holds lies in the whole tensor: boxes, for any mesh and any sharding.

A plain tensor is one box, the whole. A `DTensor` on a one-dimensional mesh with `Shard(0)` is one box of rows, of
uneven size or empty; on meshes of more dimensions (FSDP2 with tensor parallelism) its part may be several boxes.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.comm.boxes import Box, local_boxes

__all__ = ["boxes_of", "is_sharded", "like_sharded", "local_part"]


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
    if shape != local and not 0 == math.prod(shape) == math.prod(local):  # FSDP2 is free with the shape of nothing
        raise CheckpointError(
            f"tensor {name!r}: its local part has the shape {list(local)}, expected {list(shape)}: it is a tensor of "
            f"shape {list(tensor.shape)} with {layout.placements} on a mesh of {list(layout.device_mesh.shape)}"
        )
    return boxes
