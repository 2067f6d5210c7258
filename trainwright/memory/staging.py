"""How weights and gradients reach the place where they are updated, and get back.

On a CPU device they are there already. From a GPU they are copied bucket by bucket into pinned host memory on a stream
of their own, updated by the CPU while the next bucket travels, and copied back on another.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.memory.meter import local_tensor
from trainwright.memory.state_layout import Bucket, Unit

__all__ = ["CopiedStaging", "DirectStaging", "Staging"]


class Staging(Protocol):
    """Brings the units of a bucket to the host and back."""

    def fetch(self, bucket: Bucket) -> Any:
        """Begin to bring its weights and gradients; returns what the others take."""

    def arrive(self, bucket: Bucket, coming: Any) -> list[tuple[Unit, Tensor]]:
        """Wait for them: for each unit with a gradient (and every one of a whole bucket) a tensor on the host that
        holds the weights, with the gradient as its `grad`. Updated in place."""

    def send(self, bucket: Bucket, coming: Any) -> None:
        """Begin to carry the updated weights back."""

    def finish(self) -> None:
        """From here on, work on the device sees all weights that were sent."""


def _has_gradient(unit: Unit) -> bool:
    return unit.placed.parameter.grad is not None


def _flat(tensor: Tensor, unit: Unit) -> Tensor:
    return local_tensor(tensor).detach().reshape(-1)[unit.start : unit.stop]


class DirectStaging:
    """Weights on the host: updated where they are."""

    def fetch(self, bucket: Bucket) -> None:
        pass

    def arrive(self, bucket: Bucket, coming: None) -> list[tuple[Unit, Tensor]]:
        found: list[tuple[Unit, Tensor]] = []
        for unit in bucket.units:
            parameter = unit.placed.parameter
            if not unit.is_slice:
                if bucket.whole or _has_gradient(unit):
                    found.append((unit, parameter))
            elif parameter.grad is not None:
                part = _flat(parameter, unit)
                part.grad = _flat(parameter.grad, unit)
                found.append((unit, part))
        return found

    def send(self, bucket: Bucket, coming: None) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class _Lane:
    """A CUDA stream, or on a device without streams nothing: copies are then done when they return."""

    device: torch.device
    stream: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)

    def after_current(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def before_current(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def inside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def mark(self) -> Any:
        return self.stream.record_event() if self.stream is not None else None


@dataclass
class _Coming:
    parts: list[tuple[Unit, Tensor]]
    ready: Any


class CopiedStaging:
    """Weights on a device, updated on the host. Algorithms that need whole parameters do not come here."""

    def __init__(self, device: torch.device) -> None:
        self._out, self._back = _Lane(device), _Lane(device)
        self._pinned = device.type == "cuda"

    def fetch(self, bucket: Bucket) -> _Coming:
        parts = []
        self._out.after_current()
        with self._out.inside():
            for unit in bucket.units:
                gradient = unit.placed.parameter.grad
                if gradient is not None:
                    part = self._copy(_flat(unit.placed.parameter, unit))
                    part.grad = self._copy(_flat(gradient, unit))
                    parts.append((unit, part))
        return _Coming(parts, self._out.mark())

    def arrive(self, bucket: Bucket, coming: _Coming) -> list[tuple[Unit, Tensor]]:
        if coming.ready is not None:
            coming.ready.synchronize()
        return coming.parts

    def send(self, bucket: Bucket, coming: _Coming) -> None:
        self._back.after_current()
        with self._back.inside():
            for unit, part in coming.parts:
                # The host allocator keeps pinned memory until the stream that reads it is through.
                _flat(unit.placed.parameter, unit).copy_(part, non_blocking=True)

    def finish(self) -> None:
        self._back.before_current()

    def _copy(self, source: Tensor) -> Tensor:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._pinned)
        return host.copy_(source, non_blocking=True)
