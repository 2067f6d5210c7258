"""The ranks of a run as one value: who I am, how many we are, and the few ways in which all agree on something.

A single process is the same value with one rank: code that uses `Ranks` needs no second path, and torch.distributed is
not touched. Values that ranks exchange are JSON: nothing that arrives can run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """One process among `world`.

    Attributes:
        rank, world: position among all processes; 0 and 1 for a process on its own.
        local_rank: position on this host.
        local_world: processes of this run on this host.
        device: where this rank computes.
        group: the process group of all ranks; None for a process on its own.
        host_group: a group whose collectives run on host tensors (gloo); `group` itself where that is gloo.
        timeout: how long a collective may take before the others are given up.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(minutes=30)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that speaks."""
        return self.rank == 0

    def all_gather_json(self, value: Any) -> list[Any]:
        """What every rank passed, by rank. A collective: all ranks call it, in the same order of calls."""
        encoded = json.dumps(value, ensure_ascii=False)
        if self.world == 1:
            return [json.loads(encoded)]
        data = torch.frombuffer(bytearray(encoded.encode("utf-8")), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([data.numel()]), group=self.host_group)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded, group=self.host_group)
        return [
            json.loads(bytes(part[:size].numpy()).decode("utf-8")) for part, size in zip(gathered, sizes, strict=True)
        ]

    def gather_objects(self, value: Any) -> list[Any] | None:
        """What every rank passed, by rank, on the first rank; None on the others. A collective.

        For arrays that JSON would make large; they are pickled between processes of this run, never read from a file.
        """
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.is_first else None
        dist.gather_object(value, gathered, dst=self._global_rank(0), group=self.host_group)
        return gathered

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """What rank `root` passed; the argument of the others is not looked at."""
        if self.world == 1:
            return json.loads(json.dumps(value))
        source = self._global_rank(root)
        data = torch.empty(0, dtype=torch.uint8)
        if self.rank == root:
            encoded = json.dumps(value, ensure_ascii=False).encode("utf-8")
            data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        dist.broadcast(length, source, group=self.host_group)
        if self.rank != root:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, source, group=self.host_group)
        return json.loads(bytes(data.numpy()).decode("utf-8"))

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all(True)

    def all(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank; the same answer everywhere."""
        return self._agree(flag, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; the same answer everywhere."""
        return self._agree(flag, dist.ReduceOp.MAX)

    def _agree(self, flag: bool, operation: Any) -> bool:
        if self.world == 1:
            return flag
        vote = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(vote, operation, group=self.host_group)
        return bool(vote.item())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` (on the host or on `device`) by its sum over all ranks; bitwise the same on every rank."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group if tensor.device.type != "cpu" else self.host_group)
        return tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replace `tensor` by that of rank `root`."""
        if self.world > 1:
            group = self.group if tensor.device.type != "cpu" else self.host_group
            dist.broadcast(tensor, self._global_rank(root), group=group)
        return tensor

    def first_then_others(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the first rank of every host, then on the others: one fills a cache that all read.

        A failure on any rank ends the wait of the others; each raises its own error, or says that another rank failed.
        """
        if self.world == 1:
            return work()
        leads = self.local_rank == 0
        result, error = None, None
        for turn in (True, False):
            if leads is turn:
                try:
                    result = work()
                except BaseException as caught:
                    error = caught
            failed = self.any(error is not None)
            if error is not None:
                raise error
            if failed:
                raise RuntimeError("another rank failed while it prepared what all share; its error is in its output")
        return result

    def among(
        self, rank: int, world: int, group: dist.ProcessGroup | None, host_group: dist.ProcessGroup | None
    ) -> Ranks:
        """Some of these ranks, of which this one is `rank` of `world`; the host's numbers stay."""
        return replace(self, rank=rank, world=world, group=group, host_group=host_group)

    def separate(self) -> Ranks:
        """The same ranks over a gloo group of their own, whose collectives may run in a background thread.

        A collective: every rank calls it. Tensors must be on the host.
        """
        if self.world == 1:
            return self
        group = dist.new_group(
            dist.get_process_group_ranks(self.group), timeout=self.timeout, backend="gloo", group_desc="trainwright"
        )
        return Ranks(
            self.rank, self.world, self.local_rank, self.local_world, torch.device("cpu"), group, group, self.timeout
        )

    def _global_rank(self, rank: int) -> int:
        assert self.host_group is not None
        return dist.get_global_rank(self.host_group, rank)


ALONE = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
"""A process on its own, computing on the host."""
