"""Collectives for algorithms that look at whole matrices while each rank holds some part of them.

Every rank of a mesh must call these with the same matrices in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainwright.comm.boxes import cut, paste
from trainwright.optim.shard import Shard

__all__ = ["Exchange", "alike", "assign_owners", "sum_over_ranks"]

Place = tuple[int, ...]
"""A rank along each of the mesh dimensions over which matrices are divided."""

Key = tuple[int, Place]
"""(index of a matrix, whose part of it)."""


def alike(shards: Sequence[Shard | None]) -> list[list[int]]:
    """Indices of the divided ones, those over the same dimensions of one mesh together, in order of appearance."""
    kinds: dict[tuple[DeviceMesh, Place], list[int]] = {}
    for i, shard in enumerate(shards):
        if shard is not None and shard.parts > 1:
            kinds.setdefault((shard.mesh, shard.mesh_dims), []).append(i)
    return list(kinds.values())


def sum_over_ranks(parts: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    """Each vector of `parts` ([n], fp32) summed over the ranks that its shard says; those without one as they are.

    One all-reduce per dimension of a mesh, whatever the number of vectors.
    """
    result = list(parts)
    for indices in alike(shards):
        shard = shards[indices[0]]
        assert shard is not None
        together = torch.cat([parts[i] for i in indices])
        for group in shard.groups:
            dist.all_reduce(together, group=group)
        for i, summed in zip(indices, together.split([parts[i].numel() for i in indices]), strict=True):
            result[i] = summed
    return result


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """Which rank works on which task, so that the slowest rank is early: the largest first, each to the least busy."""
    owners = [0] * len(costs)
    load = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[i] = owner
        load[owner] += costs[i]
    return owners


class Exchange:
    """Brings matrices that are divided over the same dimensions of one mesh to one owner each, and parts of them back.

    Over a mesh of more than one dimension parts travel along one dimension after the other, an all-to-all each: no
    group of all ranks has to exist.

    Args:
        shards: how each matrix is divided (see `alike`).
        costs: of the work on each matrix; owners are chosen so that it is spread.
    """

    def __init__(self, shards: Sequence[Shard], costs: Sequence[int]) -> None:
        first = shards[0]
        self._shards = shards
        self._sizes, self._here, self._groups = first.sizes, first.coordinate, first.groups
        places = list(itertools.product(*(range(size) for size in self._sizes)))
        self._owners: list[Place] = [places[owner] for owner in assign_owners(costs, math.prod(self._sizes))]

    @property
    def mine(self) -> list[int]:
        """The matrices that this rank owns."""
        return [i for i, owner in enumerate(self._owners) if owner == self._here]

    def to_owners(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole matrices that this rank owns, by index, from this rank's part of every matrix, of one type."""
        held: dict[Key, Tensor] = {(i, self._here): part.reshape(-1) for i, part in enumerate(parts)}
        for dim in reversed(range(len(self._sizes))):
            held = self._along(dim, held, dtype=parts[0].dtype, device=parts[0].device, back=False)
        wholes: dict[int, Tensor] = {}
        for i in self.mine:
            shard = self._shards[i]
            wholes[i] = parts[0].new_empty(shard.shape)
            for place in itertools.product(*(range(size) for size in self._sizes)):
                shape, boxes = shard.part(place)
                paste(held[i, place].view(shape), wholes[i], boxes)
        return wholes

    def from_owners(self, wholes: Mapping[int, Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The inverse: this rank's part of every matrix, from the matrices that it owns."""
        held: dict[Key, Tensor] = {}
        for i, whole in wholes.items():
            for place in itertools.product(*(range(size) for size in self._sizes)):
                held[i, place] = cut(whole, *self._shards[i].part(place)).reshape(-1)
        for dim in range(len(self._sizes)):
            held = self._along(dim, held, dtype=dtype, device=device, back=True)
        return [held[i, self._here].view(shard.part()[0]) for i, shard in enumerate(self._shards)]

    def _along(
        self, dim: int, held: Mapping[Key, Tensor], *, dtype: torch.dtype, device: torch.device, back: bool
    ) -> dict[Key, Tensor]:
        """What this rank holds after parts moved along one mesh dimension to their owner's place in it, or back."""
        ranks = range(self._sizes[dim])
        outgoing = [list(self._outgoing(dim, other)) for other in ranks]
        incoming = [list(self._incoming(dim, other)) for other in ranks]
        if back:
            outgoing, incoming = incoming, outgoing
        send = [held[key] for keys in outgoing for key in keys]
        sizes_out = [sum(held[key].numel() for key in keys) for keys in outgoing]
        numels = [[self._numel(key) for key in keys] for keys in incoming]
        received = torch.empty(sum(map(sum, numels)), dtype=dtype, device=device)
        packed = torch.cat(send) if send else torch.empty(0, dtype=dtype, device=device)
        dist.all_to_all_single(received, packed, [sum(n) for n in numels], sizes_out, group=self._groups[dim])
        pieces = received.split([n for numbers in numels for n in numbers])
        return dict(zip((key for keys in incoming for key in keys), pieces, strict=True))

    def _numel(self, key: Key) -> int:
        index, place = key
        return math.prod(self._shards[index].part(place)[0])

    def _outgoing(self, dim: int, other: int) -> Iterator[Key]:
        """What goes to rank `other` of this dimension, the later ones being done: what its owners there work on."""
        return self._keys(dim + 1, owner=(other, *self._here[dim + 1 :]), place=self._here[: dim + 1], dim=dim)

    def _incoming(self, dim: int, other: int) -> Iterator[Key]:
        """What comes from rank `other` of this dimension: its parts of what owners at this rank's place work on."""
        place = (*self._here[:dim], other)
        return self._keys(dim + 1, owner=self._here[dim:], place=place, dim=dim)

    def _keys(self, later: int, *, owner: Place, place: Place, dim: int) -> Iterator[Key]:
        rest = [range(size) for size in self._sizes[later:]]
        for i, owned_by in enumerate(self._owners):
            if owned_by[dim:] == owner:
                for end in itertools.product(*rest):
                    yield i, (*place, *end)
