"""Sums of gradients that send only what has to be sent, add in fp32, and run while the backward pass goes on.

A reduce-scatter is an all-to-all (each rank sends every other rank that rank's part, in the wire type) and a sum in
fp32 at the receiver: (N - 1) / N of the tensor per rank, where gloo's own reduce-scatter sends twice that. A gradient
is rounded to the wire type once, and never between additions. An all-reduce is that and an all-gather of the sums.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.comm.traffic import Traffic

__all__ = ["GradientSums", "WireGroup", "flat_parts", "sum_parts"]

PIECE = 1 << 16
"""Numbers that are added at a time: 256 KiB of fp32."""

# torch 2.13 has a new name for it and warns of the old one; 2.11 knows only the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class WireGroup:
    """A process group and how gradients travel in it.

    Attributes:
        group: the ranks among which sums are formed; None for a group of one.
        wire: the type in which gradients are sent; sums are fp32 whatever it is.
    """

    group: dist.ProcessGroup | None
    wire: torch.dtype

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()


@dataclass
class _Pending:
    """A sum under way: `finish` waits for what was sent and adds it up."""

    finish: Callable[[], None]
    owner: object


class GradientSums:
    """Starts sums in the background, and completes the oldest when too many are under way.

    Args:
        depth: sums that may be under way at once: their buffers are the price of overlapping them with the backward
            pass. 0 completes each one at once.
        traffic: where sent bytes are counted.
    """

    def __init__(self, *, depth: int, traffic: Traffic) -> None:
        self.depth = depth
        self.traffic = traffic
        self._pending: deque[_Pending] = deque()

    def reduce_scatter(self, output: Tensor, whole: Tensor, among: WireGroup, owner: object) -> None:
        """Begin to fill `output` [n] with this rank's part of the sum of all ranks' `whole` [size * n].

        `output` holds nothing until `finish`. A second sum of the same `owner` first completes the one before.
        """
        self._start(owner, self._scatter(output, whole, among))

    def all_reduce(self, tensor: Tensor, among: WireGroup, owner: object) -> None:
        """Begin to replace `tensor` by the sum over the group, bitwise the same on every rank; see `finish`."""
        self._start(owner, self._all_reduce(tensor, among))

    def reduce_scatter_replicated(
        self, output: Tensor, whole: Tensor, shards: WireGroup, replicas: WireGroup, owner: object
    ) -> None:
        """`reduce_scatter` inside a shard group, then the sum of the parts over the group of equal replicas."""
        scatter = self._scatter(output, whole, shards)

        def finish() -> None:
            scatter()
            self._all_reduce(output, replicas)()

        self._start(owner, finish)

    def finish(self) -> None:
        """Complete every sum; afterwards all outputs are valid."""
        while self._pending:
            self._pending.popleft().finish()

    def _start(self, owner: object, finish: Callable[[], None]) -> None:
        while any(pending.owner is owner for pending in self._pending):
            self._pending.popleft().finish()
        self._pending.append(_Pending(finish, owner))
        # All ranks start the same sums in the same order, so they also complete them in the same order.
        while len(self._pending) > self.depth:
            self._pending.popleft().finish()

    def _scatter(self, output: Tensor, whole: Tensor, among: WireGroup) -> Callable[[], None]:
        if among.group is None or among.size == 1:
            return lambda: _assign(output, whole)
        sent = whole.to(among.wire)
        received = torch.empty_like(sent)
        # Packed here and not in the group: a group that is destroyed cannot be asked any more.
        group, size = among.group, among.size
        work = dist.all_to_all_single(received, sent, group=group, async_op=True)
        self.traffic.add("reduce_scatter", sent.numel() * sent.element_size(), size)

        def finish() -> None:
            nonlocal sent, whole
            work.wait()
            sum_parts(received.view(size, -1), output)
            del sent, whole

        return finish

    def _all_reduce(self, tensor: Tensor, among: WireGroup) -> Callable[[], None]:
        if among.group is None or among.size == 1:
            return lambda: None
        size, rank, group = among.size, among.group.rank(), among.group
        padded_size = -(-tensor.numel() // size) * size
        flat = tensor.reshape(-1)
        if padded_size != tensor.numel():
            flat = torch.cat([flat, flat.new_zeros(padded_size - tensor.numel())])
        part = torch.empty(padded_size // size, dtype=torch.float32, device=tensor.device)
        scatter = self._scatter(part, flat, among)

        def finish() -> None:
            scatter()
            gathered = torch.empty(padded_size, dtype=among.wire, device=tensor.device)
            mine = gathered.view(size, -1)[rank]
            mine.copy_(part)
            _all_gather(gathered, mine.clone(), group=group)
            self.traffic.add("all_gather_gradients", gathered.numel() * gathered.element_size(), size)
            tensor.copy_(gathered[: tensor.numel()].view(tensor.shape))

        return finish


def _assign(output: Tensor, whole: Tensor) -> None:
    output.copy_(whole)


def sum_parts(parts: Tensor, output: Tensor) -> None:
    """Sum `parts` [ranks, n] into `output` [n], in fp32 and in the order of ranks, whatever both types are.

    A piece at a time: the fp32 copies that a sum of half-precision numbers makes then stay in the cache.
    """
    for begin in range(0, output.numel(), PIECE):
        pieces = parts[:, begin : begin + PIECE]
        total = pieces[0].float() if pieces.dtype != torch.float32 else pieces[0].clone()
        for piece in pieces[1:]:
            total += piece
        output[begin : begin + PIECE].copy_(total)


def flat_parts(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Group tensors, in their order, into buckets of at most `limit` bytes (a larger tensor is a bucket by itself)."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not buckets or filled + size > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += size
    return buckets
