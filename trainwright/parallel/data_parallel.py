"""What the engine asks of data parallelism, and its simplest form: every rank holds everything.

Gradients are sums over tokens; here they become sums over all ranks as well. Nothing is divided: the engine divides
once per step by what all ranks counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainwright.comm.collectives import GradientSums, WireGroup
from trainwright.comm.mesh import Layout
from trainwright.comm.ranks import Ranks
from trainwright.comm.traffic import Traffic

__all__ = ["BUCKET_BYTES", "DataParallel", "Replicated"]

BUCKET_BYTES = 25 << 20
"""Gradients travel in buckets of this size: large enough that a collective's fixed cost vanishes, small enough that the
first is under way long before the backward pass ends (the size that PyTorch's DistributedDataParallel settled on)."""


class DataParallel:
    """One model under one layout. The engine calls, for every micro-batch, `begin_backward` and `end_backward`.

    Attributes:
        layout: what is divided over whom.
        ranks: the processes.
        traffic: bytes that this rank sent.
    """

    def __init__(self, model: nn.Module, layout: Layout, ranks: Ranks, traffic: Traffic) -> None:
        self.model = model
        self.layout = layout
        self.ranks = ranks
        self.traffic = traffic

    def begin_backward(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch; `last` says that the optimizer steps after it."""

    def end_backward(self, *, last: bool) -> None:
        """After it. After the last one every gradient is the sum over all ranks and micro-batches of the step.

        A parameter that no rank used has no gradient, as in a single process.
        """

    def drop_gathered(self) -> None:
        """Give up whole parameters that are held beside their parts: after the parts were changed from outside."""

    def shard_group_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that share one copy of the state (in place)."""
        return tensor

    def gradients(self) -> list[Tensor]:
        """Every gradient that this rank holds now, whole or in part, wherever it waits: for counting bytes."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def close(self) -> None:
        """Remove every hook; the model is an ordinary module again, with what it holds."""


@dataclass
class _Bucket:
    """Gradients that travel together."""

    parameters: list[nn.Parameter]
    waiting: int = 0
    flat: Tensor | None = None


@dataclass
class _Round:
    """The state of one backward pass whose gradients travel."""

    buckets: list[_Bucket]
    started: int = 0
    ready: set[int] = field(default_factory=set)


class Replicated(DataParallel):
    """Every rank holds all parameters; gradients are summed in buckets while the backward pass goes on.

    Hooks on parameters rather than a wrapper around the module: every method of the model may compute, names do not
    change, and a model on one process takes the same path with nothing to send.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        ranks: Ranks,
        traffic: Traffic,
        *,
        parameters: Sequence[nn.Parameter],
        among: WireGroup,
        depth: int,
    ) -> None:
        super().__init__(model, layout, ranks, traffic)
        self._among = among
        self._sums = GradientSums(depth=depth, traffic=traffic)
        self._parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._members = self._make_buckets()
        self._round: _Round | None = None
        self._handles = []
        if among.size > 1:
            self._handles = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._parameters]

    def _make_buckets(self) -> list[list[nn.Parameter]]:
        # Gradients come in about the reverse of the order of definition.
        buckets: list[list[nn.Parameter]] = []
        filled = BUCKET_BYTES
        for parameter in reversed(self._parameters):
            size = parameter.numel() * parameter.element_size()
            if filled + size > BUCKET_BYTES:
                buckets.append([])
                filled = 0
            buckets[-1].append(parameter)
            self._bucket_of[parameter] = len(buckets) - 1
            filled += size
        return buckets

    def begin_backward(self, *, last: bool) -> None:
        if last and self._among.size > 1:
            self._round = _Round([_Bucket(members, waiting=len(members)) for members in self._members])

    def _accumulated(self, parameter: Tensor) -> None:
        current = self._round
        if current is None:
            return
        assert isinstance(parameter, nn.Parameter)
        bucket = self._bucket_of[parameter]
        if id(parameter) in current.ready:
            if bucket < current.started:
                raise RuntimeError(
                    f"a parameter of shape {list(parameter.shape)} got a second gradient in one backward pass after the"
                    " first was sent; reentrant checkpointing does that: use use_reentrant=False"
                )
            return
        current.ready.add(id(parameter))
        current.buckets[bucket].waiting -= 1
        # In the order of buckets, whatever order the gradients come in: all ranks must start the same sums.
        while current.started < len(current.buckets) and current.buckets[current.started].waiting == 0:
            self._start(current)

    def _start(self, current: _Round) -> None:
        bucket = current.buckets[current.started]
        current.started += 1
        pieces = []
        for parameter in bucket.parameters:
            gradient = parameter.grad
            pieces.append(
                torch.zeros(parameter.numel(), device=parameter.device)
                if gradient is None
                else gradient.reshape(-1).to(torch.float32)
            )
        # Behind the gradients, one number for each: how many ranks have one. So a parameter that nobody used stays
        # without a gradient, and no further message is needed to know it.
        used = torch.tensor([float(p.grad is not None) for p in bucket.parameters], device=pieces[0].device)
        bucket.flat = torch.cat([*pieces, used])
        self._sums.all_reduce(bucket.flat, self._among, owner=bucket)

    def end_backward(self, *, last: bool) -> None:
        current = self._round
        if current is None:
            return
        while current.started < len(current.buckets):
            self._start(current)
        self._sums.finish()
        self._round = None
        for bucket in current.buckets:
            assert bucket.flat is not None
            self._take(bucket.parameters, bucket.flat)

    def _take(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        used = flat[-len(parameters) :].tolist()
        begin = 0
        for parameter, count in zip(parameters, used, strict=True):
            part = flat[begin : begin + parameter.numel()].view(parameter.shape)
            begin += parameter.numel()
            if count == 0:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = part.to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(part)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
