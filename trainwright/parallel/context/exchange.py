"""What context ranks send each other: keys and values to a neighbour, heads for positions, document ids to all.

A hop around the ring is an all-to-all in which each rank has something for one other rank only: NCCL and gloo send
nothing to the others, and torch's counters and fake process groups see it, which they do not of point-to-point sends.
The functional all-to-all (`torch.distributed._functional_collectives`) is a private name of torch: the public one
cannot be traced into a compiled block together with its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from trainwright.comm.mesh import Axis
from trainwright.comm.traffic import Traffic
from trainwright.parallel.context.order import SequenceOrder

__all__ = ["ContextGroup", "Hop"]


@dataclass
class Hop:
    """A tensor on its way from the rank before; `arrive` waits for it."""

    work: dist.Work
    sent: Tensor
    coming: Tensor

    def arrive(self) -> Tensor:
        self.work.wait()
        return self.coming


@dataclass(eq=False)
class ContextGroup:
    """The ranks that hold pieces of the same rows, as this one sees them.

    Attributes:
        traffic: bytes that this rank sent, by kind: ring (keys, values), ring_gradients, ulysses, documents. Counted
            outside compiled blocks only.
    """

    axis: Axis
    order: SequenceOrder
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def ring_rank(self) -> int:
        return self.axis.rank // self.order.ulysses

    def pass_on(self, tensor: Tensor, kind: str) -> Hop:
        """Begin to send a contiguous tensor to the next ring rank, and to receive that of the one before."""
        size, step = self.axis.size, self.order.ulysses
        sends, receives = [0] * size, [0] * size
        sends[(self.axis.rank + step) % size] = tensor.numel()
        receives[(self.axis.rank - step) % size] = tensor.numel()
        coming = torch.empty_like(tensor)
        work = dist.all_to_all_single(
            coming.view(-1), tensor.view(-1), receives, sends, group=self.axis.group, async_op=True
        )
        self.traffic.sent[kind] += tensor.numel() * tensor.element_size()
        self.traffic.calls[kind] += 1
        return Hop(work, tensor, coming)

    def exchange(self, parts: Tensor) -> Tensor:
        """Part i of `parts` [u, ...] goes to place i of the Ulysses group; gives theirs for this rank. Differentiable.

        In the backward pass gradients travel the other way.
        """
        size, group = self.axis.size, self.order.ulysses
        first = self.axis.rank // group * group
        splits = [1 if first <= rank < first + group else 0 for rank in range(size)]
        assert self.axis.group is not None
        received: Tensor = functional.all_to_all_single_autograd(parts.contiguous(), splits, splits, self.axis.group)
        if not torch.compiler.is_compiling():
            self.traffic.add("ulysses", parts.numel() * parts.element_size(), group)
        return received

    def gather(self, part: Tensor, kind: str) -> Tensor:
        """Integers [B, T / degree] of all context ranks, joined in order of rank: [B, T]; no gradient.

        Every layer gathers anew. A rank that remembered what the layer before has gathered could wait for nobody, or
        somebody for it, as soon as one rank alone has hooks that give a layer another tensor of the same ids.
        """
        assert self.axis.group is not None
        if torch.compiler.is_compiling():
            return functional.all_gather_tensor(part.contiguous(), 1, self.axis.group)
        pieces = torch.empty(self.axis.size, *part.shape, dtype=part.dtype, device=part.device)
        dist.all_gather(list(pieces.unbind()), part.contiguous(), group=self.axis.group)
        self.traffic.add(kind, pieces.numel() * pieces.element_size(), self.axis.size)
        return pieces.transpose(0, 1).flatten(1)
