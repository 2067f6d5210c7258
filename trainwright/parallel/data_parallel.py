"""What the engine asks of data parallelism, and its simplest form: every rank holds everything.

Gradients are sums over tokens; here they become sums over all ranks as well. Nothing is divided: the engine divides
once per step by what all ranks counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trainwright.comm.layout import Layout
from trainwright.comm.mesh import Mesh
from trainwright.comm.ranks import Ranks
from trainwright.comm.traffic import Traffic
from trainwright.parallel.buckets import Buckets

__all__ = ["DataParallel", "Replicated"]


class DataParallel:
    """One model under one layout. The engine calls, for every micro-batch, `begin_backward` and `end_backward`.

    Attributes:
        mesh: the groups of the layout.
        ranks: all processes.
        data: those that hold the same part of the model.
        traffic: bytes that this rank sent.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, traffic: Traffic) -> None:
        self.model = model
        self.mesh = mesh
        self.traffic = traffic

    @property
    def layout(self) -> Layout:
        """What is divided over whom."""
        return self.mesh.layout

    @property
    def ranks(self) -> Ranks:
        return self.mesh.ranks

    @property
    def data(self) -> Ranks:
        return self.mesh.data

    def begin_backward(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch; `last` says that the optimizer steps after it."""

    def end_backward(self, *, last: bool) -> None:
        """After it. After the last one every gradient is the sum over all ranks and micro-batches of the step.

        A parameter that no rank used has no gradient, as in a single process.
        """

    def drop_gathered(self) -> None:
        """Give up whole parameters that are held beside their parts: after the parts were changed from outside."""

    def gradients(self) -> list[Tensor]:
        """Every gradient that this rank holds now, whole or in part, wherever it waits: for counting bytes."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def close(self) -> None:
        """Remove every hook; the model is an ordinary module again, with what it holds."""


class Replicated(DataParallel):
    """Every rank of the data axis holds all parameters of its part of the model (experts: its part of them)."""

    def __init__(self, model: nn.Module, mesh: Mesh, traffic: Traffic, *, buckets: Sequence[Buckets]) -> None:
        super().__init__(model, mesh, traffic)
        self._buckets = list(buckets)

    def begin_backward(self, *, last: bool) -> None:
        for buckets in self._buckets:
            buckets.begin_backward(last=last)

    def end_backward(self, *, last: bool) -> None:
        for buckets in self._buckets:
            buckets.end_backward(last=last)

    def close(self) -> None:
        for buckets in self._buckets:
            buckets.close()
