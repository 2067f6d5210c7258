"""Activations that wait for backward outside the device: in host memory, or in a scratch file.

While a block computes, each tensor it saves is sent away; in backward it comes back, one block ahead of its use. Small
tensors and parameters stay. On a GPU the copies run on streams of their own, from and to pinned memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from trainwright.memory.meter import is_parameter, local_tensor, storage_key

__all__ = ["ActivationOffload", "HostCopies", "PinnedCopies", "Transport"]

SMALLEST_BYTES = 1 << 16  # below that a transfer costs more than the memory is worth


class Transport(Protocol):
    """Carries pieces of memory (flat byte tensors) away and back."""

    def send(self, piece: Tensor) -> Any:
        """Begin to carry `piece` away; returns a ticket for it."""

    def fetch(self, ticket: Any) -> Any:
        """Begin to bring it back; returns what `arrive` takes."""

    def arrive(self, coming: Any) -> Tensor:
        """The piece, usable on the current stream."""


class HostCopies:
    """Copies in ordinary host memory. For tests: on a CPU this moves nothing away from where it was."""

    def send(self, piece: Tensor) -> Tensor:
        return piece.to("cpu", copy=True)

    def fetch(self, ticket: Tensor) -> Tensor:
        return ticket.clone()

    def arrive(self, coming: Tensor) -> Tensor:
        return coming


class PinnedCopies:
    """Copies in pinned host memory, made on side streams so that the device goes on computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)

    def send(self, piece: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            host = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
            host.copy_(piece, non_blocking=True)
        # The allocator may hand the piece's memory out again only when the copy is through.
        piece.record_stream(self._out)
        return host, self._out.record_event()

    def fetch(self, ticket: tuple[Tensor, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event, Tensor]:
        host, sent = ticket
        with torch.cuda.stream(self._back):
            self._back.wait_event(sent)
            piece = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            piece.copy_(host, non_blocking=True)
        return piece, self._back.record_event(), host

    def arrive(self, coming: tuple[Tensor, torch.cuda.Event, Tensor]) -> Tensor:
        piece, ready, _ = coming
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        piece.record_stream(current)
        return piece


@dataclass(eq=False)
class _Piece:
    """One piece of memory that is away: a ticket, and what is on its way back."""

    ticket: Any
    size: int
    # As long as it is watched the storage's identity is not given to another one.
    storage: StorageWeakRef
    coming: Any = None
    here: Tensor | None = None


@dataclass(eq=False)
class _Block:
    """What one call of one block sent away. `before`: the call before it, which backward needs next."""

    before: weakref.ReferenceType[_Block] | None
    pieces: dict[int, _Piece] = field(default_factory=dict)


@dataclass(eq=False)
class _View:
    """How a saved tensor lies in its piece of memory. Holds its block, and so every piece of it."""

    block: _Block
    piece: _Piece
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class ActivationOffload:
    """Sends away what blocks save for backward and brings it back one block ahead.

    Args:
        transport: how, and to where; see `for_device`.

    Attributes:
        sent_bytes: carried away so far, each piece of memory once per call of a block.
        early: pieces that were on their way back before they were asked for; late: those that were not.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.sent_bytes = 0
        self.early = 0
        self.late = 0
        self._last: weakref.ReferenceType[_Block] | None = None
        self._excluded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._known: set[int] = set()

    @classmethod
    def for_device(cls, device: torch.device) -> ActivationOffload:
        """Into pinned host memory for a CUDA device; on a CPU activations are in host memory already and are copied."""
        return cls(PinnedCopies(device) if device.type == "cuda" else HostCopies())

    def exclude(self, model: nn.Module) -> None:
        """Leave this model's parameters and buffers where they are."""
        self._excluded.add(model)

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Around one call of one block."""
        block = _Block(before=self._last)
        self._known = {storage_key(t) for model in self._excluded for t in (*model.parameters(), *model.buffers())}
        with saved_tensors_hooks(lambda tensor: self._pack(block, tensor), self._unpack):
            yield
        self._last = weakref.ref(block) if block.pieces else None

    def _pack(self, block: _Block, tensor: Tensor) -> Tensor | _View:
        plain = local_tensor(tensor)
        storage = plain.untyped_storage()
        if storage.nbytes() < SMALLEST_BYTES or is_parameter(tensor) or storage._cdata in self._known:
            return tensor
        if plain is not tensor or type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor
        piece = block.pieces.get(storage._cdata)
        if piece is None:
            flat = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(storage)
            piece = block.pieces[storage._cdata] = _Piece(
                self.transport.send(flat), storage.nbytes(), StorageWeakRef(storage)
            )
            self.sent_bytes += piece.size
        return _View(block, piece, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved.block, wanted=saved.piece)
        before = saved.block.before() if saved.block.before is not None else None
        if before is not None:
            self._fetch(before)
        piece = saved.piece
        if piece.here is None:
            piece.here = self.transport.arrive(piece.coming)
            piece.coming = None
        storage = piece.here.untyped_storage()
        empty = torch.empty(0, dtype=saved.dtype, device=piece.here.device)
        return empty.set_(storage, saved.offset, saved.shape, saved.stride)

    def _fetch(self, block: _Block, wanted: _Piece | None = None) -> None:
        for piece in block.pieces.values():
            if piece.coming is None and piece.here is None:
                piece.coming = self.transport.fetch(piece.ticket)
                if piece is wanted:
                    self.late += 1
                else:
                    self.early += 1
