"""Collectives for algorithms that look at whole matrices while each rank holds some rows of them.

Every rank of a mesh must call these with the same matrices in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainwright.optim.shard import Shard

__all__ = ["assign_owners", "rows_from_owners", "rows_to_owners", "sum_over_ranks"]


def sum_over_ranks(parts: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    """Each vector of `parts` ([n], fp32) summed over the ranks of its shard's mesh; those without a shard as they are.

    One all-reduce per mesh, whatever the number of vectors.
    """
    result = list(parts)
    for indices in _by_mesh(shards):
        shard = shards[indices[0]]
        assert shard is not None
        together = torch.cat([parts[i] for i in indices])
        dist.all_reduce(together, group=shard.group)
        for i, summed in zip(indices, together.split([parts[i].numel() for i in indices]), strict=True):
            result[i] = summed
    return result


def _by_mesh(shards: Sequence[Shard | None]) -> list[list[int]]:
    """Indices of the sharded ones, those of one mesh together, in order of first appearance."""
    meshes: dict[DeviceMesh, list[int]] = {}
    for i, shard in enumerate(shards):
        if shard is not None and shard.ranks > 1:
            meshes.setdefault(shard.mesh, []).append(i)
    return list(meshes.values())


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """Which rank works on which task, so that the slowest rank is early: the largest first, each to the least busy."""
    owners = [0] * len(costs)
    load = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[i] = owner
        load[owner] += costs[i]
    return owners


def rows_to_owners(parts: Sequence[Tensor], shards: Sequence[Shard], owners: Sequence[int]) -> dict[int, Tensor]:
    """The whole matrices that this rank owns, by index, put together from every rank's rows: one all-to-all.

    Args:
        parts: this rank's rows [rows, columns] of each matrix, of one type.
        shards: all of one mesh.
        owners: the rank that gets each matrix.
    """
    group, rank, ranks = shards[0].group, shards[0].rank, shards[0].ranks
    order = [[i for i, owner in enumerate(owners) if owner == other] for other in range(ranks)]
    send = [parts[i].reshape(-1) for indices in order for i in indices]
    sizes_out = [sum(parts[i].numel() for i in indices) for indices in order]
    sizes_in = [sum(_part_numel(shards[i], other) for i in order[rank]) for other in range(ranks)]
    received = parts[0].new_empty(sum(sizes_in))
    dist.all_to_all_single(received, torch.cat(send), sizes_in, sizes_out, group=group)
    pieces: dict[int, list[Tensor]] = {i: [] for i in order[rank]}
    numels = [_part_numel(shards[i], other) for other in range(ranks) for i in order[rank]]
    keys = [i for _ in range(ranks) for i in order[rank]]
    for i, piece in zip(keys, received.split(numels), strict=True):
        pieces[i].append(piece.view(-1, *shards[i].shape[1:]))
    return {i: torch.cat(found) for i, found in pieces.items()}


def rows_from_owners(
    wholes: dict[int, Tensor], shards: Sequence[Shard], owners: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The inverse: this rank's rows of every matrix, given the matrices that it owns; one all-to-all."""
    group, rank, ranks = shards[0].group, shards[0].rank, shards[0].ranks
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    send: list[Tensor] = []
    sizes_out = []
    for other in range(ranks):
        rows = [wholes[i][shards[i].rows(other).start : shards[i].rows(other).stop].reshape(-1) for i in mine]
        send += rows
        sizes_out.append(sum(part.numel() for part in rows))
    order = [i for other in range(ranks) for i, owner in enumerate(owners) if owner == other]
    numels = [_part_numel(shards[i], rank) for i in order]
    sizes_in = [
        sum(_part_numel(shards[i], rank) for i, owner in enumerate(owners) if owner == other) for other in range(ranks)
    ]
    received = torch.empty(sum(sizes_in), dtype=dtype, device=device)
    packed = torch.cat(send) if send else torch.empty(0, dtype=dtype, device=device)
    dist.all_to_all_single(received, packed, sizes_in, sizes_out, group=group)
    result: list[Tensor] = [received] * len(shards)
    for i, piece in zip(order, received.split(numels), strict=True):
        result[i] = piece.view(-1, *shards[i].shape[1:])
    return result


def _part_numel(shard: Shard, rank: int) -> int:
    return len(shard.rows(rank)) * shard.shape[1:].numel()
