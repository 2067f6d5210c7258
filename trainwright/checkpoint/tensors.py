"""Tensors as raw little-endian bytes, and the cutting of a tensor into chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.manifest import DTYPE_BYTES, MAX_DIMENSIONS

__all__ = ["CHUNK_BYTES", "Piece", "byte_view", "chunks_of", "dtype_name", "torch_dtype"]

CHUNK_BYTES = 32 << 20
"""A chunk is the unit that is hashed and read: 32 MiB lets several threads read one large tensor, and bounds what a
rank that wants only a few rows has to read beside them."""

_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """What one rank writes of a tensor: `tensor` is the box of the global tensor that begins at `offset`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in the manifest."""
    return _DTYPES[name]


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The manifest's name of a tensor's dtype.

    Raises:
        CheckpointError: the tensor is sparse, quantised, on the meta device, or of a dtype that is not stored.
    """
    if tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"tensor {name!r}: {tensor.dtype} with layout {tensor.layout} cannot be saved",
            hint=f"dense tensors of these dtypes can: {', '.join(DTYPE_BYTES)}",
        )
    if tensor.device.type == "meta":
        raise CheckpointError(f"tensor {name!r}: it is on the meta device and has no values to save")
    if tensor.dim() > MAX_DIMENSIONS:
        raise CheckpointError(f"tensor {name!r}: {tensor.dim()} dimensions, at most {MAX_DIMENSIONS} are stored")
    return _NAMES[tensor.dtype]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy; writable, so that a file can be read into it."""
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian, and so must be the machine that reads or writes them")
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.view(-1).view(torch.uint8).numpy().data


def chunks_of(tensor: torch.Tensor, limit: int = CHUNK_BYTES) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut a tensor into boxes of at most `limit` bytes: (offset inside the tensor, contiguous box on the host).

    Cuts go along the first dimension; where a single row is larger than `limit`, along the next one, and so on.
    """
    if tensor.numel() == 0:
        return
    yield from _cut(tensor.detach(), (), limit)


def _cut(tensor: torch.Tensor, prefix: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    dims = tensor.dim() - len(prefix)
    total = tensor.numel() * tensor.element_size()
    if dims == 0 or total <= limit:
        yield (*prefix, *(0,) * dims), _on_host(tensor)
        return
    dim = len(prefix)
    rows = tensor.shape[dim]
    row_bytes = total // rows
    step = max(1, limit // row_bytes)
    for start in range(0, rows, step):
        part = tensor.narrow(dim, start, min(step, rows - start))
        if step == 1 and row_bytes > limit:
            yield from _cut(part, (*prefix, start), limit)
        else:
            yield (*prefix, start, *(0,) * (dims - 1)), _on_host(part)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().resolve_conj().resolve_neg().contiguous()
