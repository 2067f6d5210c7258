"""How this rank's part of a parameter lies in the whole: the only file here that knows DTensor.

A parameter may be divided over the dimensions of a mesh along any of its own dimensions: FSDP2 gives each rank some
rows of what tensor or expert parallelism left to it. Optimizers compute on that part as a plain tensor: dispatch
through DTensor costs tens of microseconds per operation, and fused kernels do not take it. Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.comm.boxes import Box, cut, local_boxes

__all__ = ["Shard", "local_gradient", "local_part", "parts_of", "shard_of"]


@dataclass(frozen=True)
class Shard:
    """The parts of a tensor of shape `shape` that the ranks of `mesh` hold.

    Attributes:
        mesh: of any number of dimensions.
        shape: of the whole tensor, at least one dimension.
        placements: of a DTensor, one for each dimension of the mesh; at least one divides.
    """

    mesh: DeviceMesh
    shape: torch.Size
    placements: tuple[Any, ...]

    @property
    def mesh_dims(self) -> tuple[int, ...]:
        """The dimensions of the mesh over which the tensor is divided."""
        return tuple(
            i for i, placement in enumerate(self.placements) if not placement.is_replicate() and self.mesh.size(i) > 1
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many ranks each of `mesh_dims` has."""
        return tuple(self.mesh.size(i) for i in self.mesh_dims)

    @property
    def parts(self) -> int:
        """How many different parts there are; other ranks of the mesh hold equal ones."""
        return math.prod(self.sizes)

    @property
    def coordinate(self) -> tuple[int, ...]:
        """This process's place along each of `mesh_dims`."""
        return tuple(self.mesh.get_local_rank(i) for i in self.mesh_dims)

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The process group of each of `mesh_dims`: a sum over one after the other is a sum over all parts."""
        return tuple(self.mesh.get_group(i) for i in self.mesh_dims)

    def part(self, coordinate: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], tuple[Box, ...]]:
        """(shape, boxes of the whole) of the part at a place along `mesh_dims`; None is this process's."""
        place = [0] * self.mesh.ndim
        for i, index in zip(self.mesh_dims, self.coordinate if coordinate is None else coordinate, strict=True):
            place[i] = index
        return local_boxes(self.shape, self.mesh.shape, place, self.placements)

    def over(self, *dims: int) -> Shard | None:
        """How this rank's part in all other dimensions is divided along the tensor dimensions `dims` (negative ones
        count from the end); None where it is not."""
        count = len(self.shape)
        chosen = {dim % count for dim in dims}
        return self._with(chosen, [whole if i in chosen else mine for i, (whole, mine) in self._extents()])

    def without(self, *dims: int) -> Shard | None:
        """How a tensor lies that is like this one, but has one number along `dims`; None where all ranks have all."""
        count = len(self.shape)
        dropped = {dim % count for dim in dims}
        kept = set(range(count)) - dropped
        return self._with(kept, [1 if i in dropped else whole for i, (whole, _) in self._extents()])

    def _extents(self) -> Iterable[tuple[int, tuple[int, int]]]:
        return enumerate(zip(self.shape, self.part()[0], strict=True))

    def _with(self, divided: set[int], shape: list[int]) -> Shard | None:
        placements = tuple(
            Replicate() if placement.is_replicate() or placement.dim % len(shape) not in divided else placement
            for placement in self.placements
        )
        found = replace(self, shape=torch.Size(shape), placements=placements)
        return None if all(placement.is_replicate() for placement in placements) else found

    def wrap(self, local: Tensor) -> DTensor:
        """A tensor that holds this rank's part as a DTensor over the same memory."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    def unwrap(self, value: Tensor, what: str) -> Tensor:
        """This rank's part of `value`: a DTensor of the same placement, or a plain tensor that holds the whole.

        Raises CheckpointError for a DTensor of another mesh or placement, and for other shapes.
        """
        if value.shape != self.shape:
            raise CheckpointError(
                f"{what} has shape {list(value.shape)}, expected {list(self.shape)}",
                hint="the checkpoint belongs to a model of another size",
            )
        if not isinstance(value, DTensor):
            return cut(value, *self.part())
        if value.device_mesh != self.mesh or tuple(value.placements) != self.placements:
            raise CheckpointError(
                f"{what} is spread as {value.placements} over {value.device_mesh}, "
                f"expected {self.placements} over {self.mesh}",
                hint="load it into the state_dict() of this optimizer, which has the right placement",
            )
        return local_part(value)


def shard_of(tensor: Tensor) -> Shard | None:
    """How a DTensor is divided; None for tensors that every rank holds whole.

    Raises ConfigError for partial sums and for placements that cut in another way than torch.chunk.
    """
    if not isinstance(tensor, DTensor):
        return None
    placements = tuple(tensor.placements)
    if all(placement.is_replicate() for placement in placements):
        return None
    for placement in placements:
        # Not isinstance: torch's class for what FSDP2 makes of rows that are divided already is private.
        if not placement.is_replicate() and type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ConfigError(
                f"a parameter of shape {list(tensor.shape)} is spread as {placements}",
                hint="optimizers take parameters that are divided (Shard) or equal on all ranks (Replicate)",
            )
    return Shard(tensor.device_mesh, tensor.shape, placements)


def parts_of(tensor: Tensor) -> int:
    """How many different parts a tensor is divided into over its mesh; 1 where every rank holds the whole."""
    shard = shard_of(tensor)
    return 1 if shard is None else shard.parts


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of `tensor` (itself, if it is plain); the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # else to_local is an autograd operation and gives a tensor that requires a gradient
        local: Tensor = tensor.to_local()
    return local.detach()


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient; None where it has none.

    Raises RuntimeError where the gradient is not divided as the parameter is: a sum over ranks was left out.
    """
    grad = parameter.grad
    if grad is None:
        return None
    local = local_part(grad)
    partial = isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements)
    if partial or local.shape != local_part(parameter).shape:
        raise RuntimeError(
            f"the gradient of a parameter of shape {list(parameter.shape)} is spread as "
            f"{getattr(grad, 'placements', 'a plain tensor')}, the parameter as "
            f"{getattr(parameter, 'placements', 'a plain tensor')}: it was not summed over its ranks before the step"
        )
    return local
