"""Gradients that several ranks hold alike: summed in buckets while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainwright.comm.collectives import GradientSums, WireGroup
from trainwright.comm.traffic import Traffic

__all__ = ["BUCKET_BYTES", "Buckets", "complete_sums"]

BUCKET_BYTES = 25 << 20
"""Gradients travel in buckets of this size: large enough that a collective's fixed cost vanishes, small enough that the
first is under way long before the backward pass ends (the size that PyTorch's DistributedDataParallel settled on)."""


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


class Buckets:
    """Gradients of parameters that a group of ranks holds alike, summed in buckets while the backward pass goes on.

    Hooks on parameters rather than a wrapper around the module: every method of the model may compute, names do not
    change, and a model on one process takes the same path with nothing to send. A parameter that is divided over other
    axes is a DTensor: its local part is what travels; where its gradient is a part of a sum over such an axis
    (`Partial`), that sum is formed first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], among: WireGroup, *, depth: int, traffic: Traffic) -> None:
        self._among = among
        self._sums = GradientSums(depth=depth, traffic=traffic)
        self._parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._members = self._make_buckets()
        self._round: _Round | None = None
        self._handles = []
        if among.size > 1:
            self._handles = [p.register_post_accumulate_grad_hook(self.accumulated) for p in self._parameters]

    def _make_buckets(self) -> list[list[nn.Parameter]]:
        # Gradients come in about the reverse of the order of definition.
        buckets: list[list[nn.Parameter]] = []
        filled = BUCKET_BYTES
        for parameter in reversed(self._parameters):
            size = parameter.numel() * parameter.element_size()  # of the whole: equal on all ranks of every axis
            if filled + size > BUCKET_BYTES:
                buckets.append([])
                filled = 0
            buckets[-1].append(parameter)
            self._bucket_of[parameter] = len(buckets) - 1
            filled += size
        return buckets

    def begin_backward(self, *, last: bool) -> None:
        """See `DataParallel`."""
        if last and self._among.size > 1:
            self._round = _Round([_Bucket(members, waiting=len(members)) for members in self._members])

    def accumulated(self, parameter: Tensor) -> None:
        """A hook: the gradient of `parameter` is complete."""
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
        complete_sums(bucket.parameters)
        pieces = []
        for parameter in bucket.parameters:
            gradient = parameter.grad
            pieces.append(
                torch.zeros(_local(parameter).numel(), device=parameter.device)
                if gradient is None
                else _local(gradient).reshape(-1).to(torch.float32)
            )
        # Behind the gradients, one number for each: how many ranks have one. So a parameter that nobody used stays
        # without a gradient, and no further message is needed to know it.
        used = torch.tensor([float(p.grad is not None) for p in bucket.parameters], device=pieces[0].device)
        bucket.flat = torch.cat([*pieces, used])
        self._sums.all_reduce(bucket.flat, self._among, owner=bucket)

    def end_backward(self, *, last: bool) -> None:
        """See `DataParallel`."""
        current = self._round
        if current is None:
            if last:
                complete_sums(self._parameters)
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
            local = _local(parameter)
            part = flat[begin : begin + local.numel()].view(local.shape)
            begin += local.numel()
            if count == 0:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = _like(parameter, part.to(parameter.dtype, copy=True))
            else:
                _local(parameter.grad).copy_(part)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@torch.no_grad()
def complete_sums(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients that are parts of a sum over an axis of their parameter's own mesh: one message for each mesh
    and type, in fp32 at least.

    Norms under sequence parallelism see some of the tokens, replicated key and value heads some of the queries.
    """
    waiting: dict[tuple[DeviceMesh, torch.dtype], list[tuple[nn.Parameter, Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and _is_partial(gradient):
            assert gradient.device_mesh.ndim == 1, "parameters are divided over one axis before ZeRO"
            wide = torch.promote_types(gradient.dtype, torch.float32)
            waiting.setdefault((gradient.device_mesh, wide), []).append((parameter, gradient._local_tensor))
    for (mesh, wide), pairs in waiting.items():
        flat = torch.cat([local.reshape(-1).to(wide) for _, local in pairs])
        dist.all_reduce(flat, group=mesh.get_group())
        sums = flat.split([local.numel() for _, local in pairs])
        for (parameter, local), part in zip(pairs, sums, strict=True):
            parameter.grad = _like(parameter, part.view(local.shape).to(parameter.dtype))


def _is_partial(gradient: DTensor) -> bool:
    return any(placement.is_partial() for placement in gradient.placements)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as a gradient of `parameter`: a DTensor of its placements where it is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor(local, parameter._spec, requires_grad=False)
