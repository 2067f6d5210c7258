"""A copy of the state in host memory, allocated once: what an asynchronous save writes while training goes on."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch

from trainwright.checkpoint.tensors import dtype_name

__all__ = ["HostSnapshot"]

_ALIGNMENT = 64


class HostSnapshot:
    """Host buffers with the layout of a state, reused as long as names, shapes and dtypes stay the same.

    Costs as much host memory as the state has bytes. Fresh memory is the slow part of a copy (every page is a fault),
    so `prepare` before the first step keeps that out of the first save.
    """

    def __init__(self) -> None:
        self._layout: dict[str, tuple[torch.dtype, torch.Size, str]] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """Host memory held."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Allocate and touch the buffers for these tensors, unless they fit already.

        Raises:
            CheckpointError: a tensor cannot be saved.
        """
        layout = {name: (t.dtype, t.shape, t.device.type) for name, t in tensors.items()}
        if layout == self._layout:
            return
        for name, tensor in tensors.items():
            dtype_name(tensor, name)
        self._buffers, self._layout = {}, {}  # the old ones go before the new ones come
        self._buffers = _allocate(layout)
        self._layout = layout

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy all tensors; when this returns, the originals may change. The result is valid until the next `take`."""
        self.prepare(tensors)
        devices = set()
        for name, tensor in tensors.items():
            # torch copies large tensors with all its threads; copies from a GPU into pinned memory run one after the
            # other on its stream and are awaited once, below.
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return self._buffers

    def release(self) -> None:
        """Give the memory back."""
        self._buffers, self._layout = {}, {}


def _allocate(layout: Mapping[str, tuple[torch.dtype, torch.Size, str]]) -> dict[str, torch.Tensor]:
    """One region for all host tensors, in huge pages where the system has them; pinned memory for those of a GPU."""
    buffers: dict[str, torch.Tensor] = {}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for name, (dtype, shape, device) in layout.items():
        size = shape.numel() * dtype.itemsize
        if device == "cuda":
            buffers[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
        elif size == 0:
            buffers[name] = torch.empty(shape, dtype=dtype)
        else:
            places[name] = (position, size)
            position += size + -size % _ALIGNMENT
    if places:
        region = mmap.mmap(-1, position)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(region, dtype=torch.uint8)  # keeps the region alive
        memory.zero_()
        for name, (start, size) in places.items():
            dtype, shape, _ = layout[name]
            buffers[name] = memory.narrow(0, start, size).view(dtype).view(shape)
    return {name: buffers[name] for name in layout}
