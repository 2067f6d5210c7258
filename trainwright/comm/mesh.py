"""The layout of a run's processes as one frozen value, and the groups it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainwright.base.errors import ConfigError
from trainwright.comm.ranks import Ranks

__all__ = ["DataMesh", "Layout", "make_data_mesh"]


@dataclass(frozen=True)
class Layout:
    """How the state of training is divided over the data-parallel ranks.

    Attributes:
        world: data-parallel ranks.
        zero: 0 replicates everything; 1 shards optimizer state; 2 gradients too; 3 parameters too (arXiv 1910.02054).
        shard: ranks that hold one copy of the state together; `world / shard` equal replicas of it. 1 at stage 0.
        accumulate: "local" adds up the gradients of all micro-batches before they travel (a whole gradient in memory);
            "sharded" sends those of every micro-batch, and holds only this rank's part.
        gather: "step" keeps gathered parameters from the first forward pass of a step to its last backward pass;
            "micro_batch" gives them up after each block's forward and backward pass.
    """

    world: int
    zero: int
    shard: int
    accumulate: str = "local"
    gather: str = "step"

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(
                f"this layout cannot run on {self.world} processes: " + "; ".join(problems), hint=self._nearest()
            )

    def _problems(self) -> list[str]:
        problems = []
        if self.zero not in (0, 1, 2, 3):
            problems.append(f"parallel.zero is {self.zero}, expected 0, 1, 2 or 3")
        if self.shard < 1 or self.world % self.shard:
            problems.append(f"parallel.shard {self.shard} does not divide the {self.world} processes")
        if self.zero == 0 and self.shard != 1:
            problems.append(f"parallel.shard is {self.shard}, but stage 0 shards nothing")
        if self.zero in (0, 1) and self.accumulate == "sharded":
            problems.append(f"parallel.accumulate is sharded, but stage {self.zero} holds whole gradients")
        if self.zero != 3 and self.gather == "micro_batch":
            problems.append(f"parallel.gather is micro_batch, but stage {self.zero} holds whole parameters")
        return problems

    def _nearest(self) -> str:
        divisors = [str(d) for d in range(1, self.world + 1) if self.world % d == 0]
        return f"parallel.shard can be {', '.join(divisors)} here; shards belong to stages 1 to 3"

    @property
    def replicas(self) -> int:
        """How many equal copies of the state there are."""
        return self.world // self.shard

    @property
    def is_sharded(self) -> bool:
        """Whether any state is divided at all: one process, or shards of one rank, divide nothing."""
        return self.zero > 0 and self.shard > 1

    def describe(self) -> str:
        """The layout in words, for the plan and the log."""
        if self.world == 1:
            return "one process: nothing is divided"
        if not self.is_sharded:
            return f"{self.world} replicas; gradients are summed over all (2 Psi a step)"
        what = {
            1: "optimizer state",
            2: "optimizer state and gradients",
            3: "optimizer state, gradients and parameters",
        }
        text = f"ZeRO-{self.zero}: {what[self.zero]} divided over {self.shard} ranks"
        if self.replicas > 1:
            text += f", {self.replicas} replicas of that"
        kept = {
            "local": "gradients add up on every rank and travel once a step",
            "sharded": "gradients travel with every micro-batch",
        }
        gathered = {
            "step": "parameters are gathered once a step",
            "micro_batch": "parameters are gathered twice for every micro-batch",
        }
        return f"{text}; {kept[self.accumulate]}; {gathered[self.gather]}"

    def wire_psi(self, micro_batches: int) -> float:
        """Elements that a rank sends per step, in units of Psi (N - 1) / N for Psi parameters; replicas not counted."""
        if not self.is_sharded:
            return 2.0 if self.world > 1 else 0.0
        gathers = 1 if self.gather == "step" else 2 * micro_batches
        return gathers + (1 if self.accumulate == "local" else micro_batches)


@dataclass(frozen=True)
class DataMesh:
    """The groups of a layout as this rank sees them.

    Attributes:
        shard: the 1-D mesh over which this rank's copy of the state is divided; None where nothing is divided.
        shard_group, replica_group: the process groups of the ranks that hold the other parts of this copy, and of those
            that hold the same part of the other copies; None for groups of one.
        all_group: the group of all data-parallel ranks; None for one process.
    """

    shard: DeviceMesh | None
    shard_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    all_group: dist.ProcessGroup | None

    def close(self) -> None:
        """Give up the groups that were made for this mesh."""
        for group in (self.shard_group, self.replica_group):
            if group is not None and group is not self.all_group and dist.is_initialized():
                dist.destroy_process_group(group)


def make_data_mesh(layout: Layout, ranks: Ranks) -> DataMesh:
    """Make the groups; a collective of all ranks. Ranks that are near each other (neighbours in rank) share a copy."""
    if ranks.world != layout.world:
        raise ConfigError(f"the layout is for {layout.world} processes, and {ranks.world} run")
    if ranks.world == 1:
        return DataMesh(None, None, None, None)
    if not layout.is_sharded:
        return DataMesh(None, None, ranks.group, ranks.group)
    if layout.replicas == 1:
        return DataMesh(_mesh(ranks, ranks.group), ranks.group, None, ranks.group)
    copies = [list(range(begin, begin + layout.shard)) for begin in range(0, layout.world, layout.shard)]
    places = [list(range(place, layout.world, layout.shard)) for place in range(layout.shard)]
    shard_group, replica_group = _own_group(copies, ranks), _own_group(places, ranks)
    return DataMesh(_mesh(ranks, shard_group), shard_group, replica_group, ranks.group)


def _mesh(ranks: Ranks, group: dist.ProcessGroup | None) -> DeviceMesh:
    assert group is not None
    return DeviceMesh.from_group(group, ranks.device.type, mesh_dim_names=("shard",))


def _own_group(members: list[list[int]], ranks: Ranks) -> dist.ProcessGroup:
    """One group for each list of ranks, made by all ranks alike; returns the one that this rank is in."""
    own: dist.ProcessGroup | None = None
    for among in members:
        group = dist.new_group(among, timeout=ranks.timeout)
        if ranks.rank in among:
            own = group
    assert own is not None
    return own
