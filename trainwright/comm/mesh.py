"""The groups that a layout makes of the ranks, as each rank sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import Layout, PipelineLayout
from trainwright.comm.ranks import Ranks

__all__ = ["Axis", "Layout", "Mesh", "PipelineLayout", "make_mesh"]


Members = tuple[tuple[int, ...], ...]
"""Equally large sets of ranks that together are all ranks, once each."""


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        rank, size: this rank's place on the axis, and how many there are.
        group: the process group of the axis; None for an axis of one rank.
        mesh: a one-dimensional submesh of the root, for DTensors; None for an axis of one rank, and for axes on which
            no parameters are divided.
    """

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    @classmethod
    def alone(cls, name: str) -> Axis:
        """An axis of one rank: nothing is divided along it."""
        return cls(name, 0, 1)


@dataclass(frozen=True)
class Mesh:
    """A layout's groups.

    Attributes:
        ranks: all processes.
        data: those that hold the same part of the model as this one (the context ranks among them).
        rows: (place, count) among the ranks that see different rows of a batch.
        shard, replica: this copy of the ZeRO state, and the holders of the same part of other copies.
        tensor, context, expert, pipeline: the axes that divide the model and its sequences.
        expert_shard, expert_replica: what `shard` and `replica` are for the parameters of experts.
    """

    layout: Layout
    ranks: Ranks
    data: Ranks
    rows: tuple[int, int]
    shard: Axis
    replica: Axis
    tensor: Axis
    context: Axis
    expert: Axis
    expert_shard: Axis
    expert_replica: Axis
    pipeline: Axis
    made: tuple[dist.ProcessGroup, ...] = ()

    def close(self) -> None:
        """Give up the groups that were made for this mesh."""
        for group in self.made:
            if dist.is_initialized():
                dist.destroy_process_group(group)
        if self.made:
            # DTensor notes which layout each operation gives, mesh and all, and takes meshes of equal shape for one:
            # later ones would get tensors on the groups that are gone.
            _clear_sharding_prop_cache()


def make_mesh(layout: Layout, ranks: Ranks) -> Mesh:
    """Make the groups; a collective of all ranks, which pass equal layouts."""
    if ranks.world != layout.world:
        raise ConfigError(f"the layout is for {layout.world} processes, and {ranks.world} run")
    return _Maker(layout, ranks).make()


class _Maker:
    """Groups are made once for each set of ranks, by all ranks in the same order; those of all ranks are there."""

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self.layout = layout
        self.ranks = ranks
        self.made: dict[Members, dist.ProcessGroup] = {}
        self.hosts: list[dist.ProcessGroup] = []
        outer = layout.replicas if layout.is_sharded else layout.data // layout.expert
        inner = layout.shard // layout.expert if layout.is_sharded else 1
        sizes = (layout.pipeline.stages, outer, inner, layout.expert, layout.tensor)
        # [pipeline, replica, expert_shard, expert, tensor]
        self.grid = torch.arange(layout.world).view(sizes)

    def make(self) -> Mesh:
        layout, ranks = self.layout, self.ranks
        data_members = self._members((1, 2, 3))
        # Neighbours on the data axis; a cut of its own, which need not be one of the grid's.
        context = tuple(
            row[first : first + layout.context]
            for row in data_members
            for first in range(0, layout.data, layout.context)
        )
        data = self._sub_ranks(data_members)
        replica_dims = (1,) if layout.is_sharded else (1, 3)
        meshes = self._meshes()
        return Mesh(
            layout=layout,
            ranks=ranks,
            data=data,
            rows=(data.rank // layout.context, layout.rows),
            shard=self._axis("shard", (2, 3), meshes) if layout.is_sharded else Axis.alone("shard"),
            replica=self._axis("replica", replica_dims),
            tensor=self._axis("tensor", (4,), meshes),
            context=self._axis_of("context", context),
            expert=self._axis("expert", (3,), meshes),
            expert_shard=self._axis("expert_shard", (2,), meshes),
            expert_replica=self._axis("expert_replica", (1,)),
            pipeline=self._axis("pipeline", (0,)),
            made=(*self.made.values(), *self.hosts),
        )

    def _axis(self, name: str, dims: Sequence[int], meshes: dict[str, DeviceMesh] | None = None) -> Axis:
        return self._axis_of(name, self._members(dims), (meshes or {}).get(name))

    def _axis_of(self, name: str, members: Members, mesh: DeviceMesh | None = None) -> Axis:
        mine = self._mine(members)
        if len(mine) == 1:
            return Axis.alone(name)
        return Axis(name, mine.index(self.ranks.rank), len(mine), self._group(members), mesh)

    def _mine(self, members: Members) -> tuple[int, ...]:
        return next(among for among in members if self.ranks.rank in among)

    def _group(self, members: Members) -> dist.ProcessGroup:
        """This rank's group among equally large sets of ranks that together are all ranks."""
        assert self.ranks.group is not None
        if len(members) == 1 and members[0] == tuple(range(self.ranks.world)):
            return self.ranks.group
        if members not in self.made:
            self.made[members] = self._new_group(members)
        return self.made[members]

    def _new_group(self, members: Members, backend: str | None = None) -> dist.ProcessGroup:
        own: dist.ProcessGroup | None = None
        for among in members:
            group = dist.new_group(list(among), timeout=self.ranks.timeout, backend=backend)
            if self.ranks.rank in among:
                own = group
        assert own is not None
        return own

    def _sub_ranks(self, members: Members) -> Ranks:
        mine = self._mine(members)
        if len(mine) == self.ranks.world:
            return self.ranks
        if len(mine) == 1:
            return self.ranks.among(0, 1, None, None)
        group = self._group(members)
        host = group
        if self.ranks.host_group is not self.ranks.group:
            host = self._new_group(members, backend="gloo")
            self.hosts.append(host)
        return self.ranks.among(mine.index(self.ranks.rank), len(mine), group, host)

    def _meshes(self) -> dict[str, DeviceMesh]:
        """The submeshes on which parameters live, all of one root over all ranks: FSDP2 joins only such."""
        names = ("pipeline", "expert_replica", "expert_shard", "expert", "tensor")
        dims = [dim for dim in range(5) if self.grid.shape[dim] > 1]
        if not any(dim in dims for dim in ((2, 3, 4) if self.layout.is_sharded else (3, 4))):
            return {}
        groups = [group for dim in dims if (group := self._axis(names[dim], (dim,)).group) is not None]
        kind = self.ranks.device.type
        if len(dims) == 1:
            root = DeviceMesh.from_group(groups[0], kind, mesh_dim_names=(names[dims[0]],))
            found = {names[dims[0]]: root}
        else:
            sizes = [self.grid.shape[dim] for dim in dims]
            called = tuple(names[dim] for dim in dims)
            root = DeviceMesh.from_group(groups, kind, mesh=self.grid.reshape(sizes), mesh_dim_names=called)
            found = {name: root[name] for name in called}
        if self.layout.is_sharded:
            pair = tuple(name for name in ("expert_shard", "expert") if name in found)
            if len(pair) == 1:
                found["shard"] = found[pair[0]]
            else:
                found["shard"] = root[pair]._flatten("shard")
                # The flattened mesh made this group itself; it stands for the ranks of the shard axis from here on.
                # Over all ranks torch takes the group that exists, which is not ours to give up.
                if (group := found["shard"].get_group()) is not self.ranks.group:
                    self.made[self._members((2, 3))] = group
        return found

    def _members(self, dims: Sequence[int]) -> Members:
        """All sets of ranks that differ along `dims` only."""
        others = [dim for dim in range(5) if dim not in dims]
        size = math.prod(self.grid.shape[dim] for dim in dims)
        return tuple(tuple(row) for row in self.grid.permute(*others, *dims).reshape(-1, size).tolist())
