"""How this rank's part of a parameter lies in the whole: the only file here that knows DTensor.

FSDP2 gives each rank of a one-dimensional mesh some rows of every parameter (`Shard(0)`, chunked as torch.chunk does,
so the last ranks may have fewer rows or none). Optimizers compute on those rows as plain tensors: dispatch through
DTensor costs tens of microseconds per operation, and fused kernels do not take it. Nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from trainwright.base.errors import CheckpointError, ConfigError

__all__ = ["Shard", "local_part", "local_parts", "shard_of"]


@dataclass(frozen=True)
class Shard:
    """The rows of a tensor of shape `shape` that each rank of `mesh` holds.

    Attributes:
        mesh: one-dimensional.
        shape: of the whole tensor, at least one dimension.
    """

    mesh: DeviceMesh
    shape: torch.Size

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """This process's place in the mesh."""
        return self.mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def rows(self, rank: int) -> range:
        """The rows that `rank` of the mesh holds."""
        chunk = -(-self.shape[0] // self.ranks)
        return range(min(rank * chunk, self.shape[0]), min((rank + 1) * chunk, self.shape[0]))

    @property
    def first_element(self) -> int:
        """Index of this rank's first number in the whole tensor, row by row."""
        return self.rows(self.rank).start * self.shape[1:].numel()

    def wrap(self, local: Tensor) -> DTensor:
        """A tensor with this rank's rows ([rows, ...], further dimensions free) as a DTensor over the same memory."""
        shape = torch.Size((self.shape[0], *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [ShardPlacement(0)], run_check=False, shape=shape, stride=stride)

    def unwrap(self, value: Tensor, what: str) -> Tensor:
        """This rank's rows of `value`: a DTensor of the same placement, or a plain tensor that holds all rows.

        Raises CheckpointError for a DTensor of another mesh or placement.
        """
        if not isinstance(value, DTensor):
            rows = self.rows(self.rank)
            return value[rows.start : rows.stop] if value.shape[:1] == self.shape[:1] else value
        if value.device_mesh != self.mesh or tuple(value.placements) != (ShardPlacement(0),):
            raise CheckpointError(
                f"{what} is spread as {value.placements} over {value.device_mesh}, expected rows over {self.mesh}",
                hint="load it into the state_dict() of this optimizer, which has the right placement",
            )
        return local_part(value)


def shard_of(tensor: Tensor) -> Shard | None:
    """Where this rank's rows of a DTensor belong; None for tensors that every rank holds whole.

    Raises ConfigError for placements other than rows over a one-dimensional mesh.
    """
    if not isinstance(tensor, DTensor):
        return None
    placements = tuple(tensor.placements)
    if all(isinstance(placement, Replicate) for placement in placements):
        return None
    if placements != (ShardPlacement(0),):
        raise ConfigError(
            f"a parameter of shape {list(tensor.shape)} is spread as {placements}",
            hint="optimizers take parameters that are sharded by rows over a one-dimensional mesh",
        )
    return Shard(tensor.device_mesh, tensor.shape)


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of `tensor` (itself, if it is plain); the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # else to_local is an autograd operation and gives a tensor that requires a gradient
        local: Tensor = tensor.to_local()
    return local.detach()


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """`local_part` of each, without those of which this rank holds nothing."""
    return [part for part in map(local_part, tensors) if part.numel()]
