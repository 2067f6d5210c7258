"""The groups that a layout makes of the ranks, as each rank sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

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


@dataclass
class _Known:
    """Groups and meshes that were made in this process, for as long as torch.distributed runs.

    DTensor keeps what it worked out for one mesh and uses it for every equal one: were the groups of a mesh given up
    and made again under other names, it would send to the old ones.
    """

    world: object = None
    groups: dict[tuple[str | None, Members], dist.ProcessGroup] = field(default_factory=dict)
    meshes: dict[tuple[object, ...], dict[str, DeviceMesh]] = field(default_factory=dict)


_known = _Known()


def _known_now() -> _Known:
    global _known
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if _known.world is not world:
        _known = _Known(world)
    return _known


def make_mesh(layout: Layout, ranks: Ranks) -> Mesh:
    """Make the groups, or take those that an equal layout had before; a collective of all ranks, which pass equal ones.

    Groups live as long as torch.distributed does.
    """
    if ranks.world != layout.world:
        raise ConfigError(f"the layout is for {layout.world} processes, and {ranks.world} run")
    return _Maker(layout, ranks).make()


class _Maker:
    """Groups are made once for each set of ranks, by all ranks in the same order; those of all ranks are there."""

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self.layout = layout
        self.ranks = ranks
        self.known = _known_now()
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
        return self._made(members)

    def _made(self, members: Members, backend: str | None = None) -> dist.ProcessGroup:
        if (backend, members) in self.known.groups:
            return self.known.groups[backend, members]
        own: dist.ProcessGroup | None = None
        for among in members:
            group = dist.new_group(list(among), timeout=self.ranks.timeout, backend=backend)
            if self.ranks.rank in among:
                own = group
        assert own is not None
        self.known.groups[backend, members] = own
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
            host = self._made(members, backend="gloo")
        return self.ranks.among(mine.index(self.ranks.rank), len(mine), group, host)

    def _meshes(self) -> dict[str, DeviceMesh]:
        """The submeshes on which parameters live, all of one root over all ranks: FSDP2 joins only such."""
        names = ("pipeline", "expert_replica", "expert_shard", "expert", "tensor")
        dims = [dim for dim in range(5) if self.grid.shape[dim] > 1]
        if not any(dim in dims for dim in ((2, 3, 4) if self.layout.is_sharded else (3, 4))):
            return {}
        key = (tuple(self.grid.shape), self.layout.is_sharded, self.ranks.device.type)
        if key not in self.known.meshes:
            self.known.meshes[key] = self._new_meshes(dims, names)
        return self.known.meshes[key]

    def _new_meshes(self, dims: list[int], names: Sequence[str]) -> dict[str, DeviceMesh]:
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
                # The flattened mesh has a group for these ranks by itself; so has the axis, where nobody had one.
                self.known.groups.setdefault((None, self._members((2, 3))), found["shard"].get_group())
        return found

    def _members(self, dims: Sequence[int]) -> Members:
        """All sets of ranks that differ along `dims` only."""
        others = [dim for dim in range(5) if dim not in dims]
        size = math.prod(self.grid.shape[dim] for dim in dims)
        return tuple(tuple(row) for row in self.grid.permute(*others, *dims).reshape(-1, size).tolist())
