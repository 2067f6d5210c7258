"""Reading a checkpoint: every byte that is returned was compared with its hash, whatever layout asks for it.

A tensor is read by the boxes of its chunks, so a process that wants a part of a global tensor reads the chunks which
overlap that part and no others. Chunks are read and hashed by a few threads straight into the tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.base.faults import fault_point
from trainwright.checkpoint import storage
from trainwright.checkpoint.manifest import MANIFEST_NAME, ChunkEntry, Manifest, TensorEntry
from trainwright.checkpoint.tensors import byte_view, torch_dtype
from trainwright.checkpoint.tree import Json, unflatten
from trainwright.checkpoint.validation import file_problems, read_manifest, refusal
from trainwright.comm.boxes import Box, narrow

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """One checkpoint, open for reading. The manifest and all sizes are checked on opening, hashes on what is read.

    Raises:
        CheckpointError: on opening or reading, with the path, the file and the reason.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._opened = contextlib.ExitStack()
        try:
            self._folder = self._opened.enter_context(storage.folder_descriptor(self.path))
            with self._naming_path():
                self.manifest: Manifest = read_manifest(self._folder, self.path)
                problems = file_problems(self._folder, self.manifest)
                if problems:
                    raise CheckpointError("; ".join(f"{n}: {r}" for n, r in sorted(problems.items())[:8]))
                self._files = {name: self._open(name) for name in self.manifest.files}
        except BaseException:
            self._opened.close()
            raise
        self.step = self.manifest.step

    def _open(self, name: str) -> int:
        descriptor, _ = storage.open_regular(self._folder, name)
        self._opened.callback(os.close, descriptor)
        return descriptor

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @contextlib.contextmanager
    def _naming_path(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise refusal(self.path, error.message) from error

    @property
    def meta(self) -> dict[str, Any]:
        """What the saver noted beside the state."""
        return unflatten(self.manifest.meta, {}, what="meta")

    def read_state(self) -> dict[str, Any]:
        """The whole state, exactly as it was saved. Every byte of every file is checked, padding included."""
        tensors = self.read_parts({name: _whole(entry.shape) for name, entry in self.manifest.tensors.items()})
        return self.state_with(tensors)

    def state_with(self, tensors: Mapping[str, Any], tree: Json = None) -> dict[str, Any]:
        """The saved state, or a part of its tree, with these tensors, by name, in their places."""
        with self._naming_path():
            return unflatten(self.manifest.state if tree is None else tree, tensors)

    def read_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of a global tensor that begins at `offset`; reads only the chunks that overlap it.

        Raises:
            CheckpointError: there is no such tensor, the box is not inside it, or what was read is damaged.
        """
        box = Box(tuple(offset), tuple(shape), (0,) * len(shape))
        return self.read_parts({name: (tuple(shape), (box,))}, padding_of=())[name]

    def read_parts(
        self,
        parts: Mapping[str, tuple[tuple[int, ...], Sequence[Box]]],
        *,
        padding_of: Iterable[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Parts of several tensors at once; reads and checks only the chunks that overlap them.

        Args:
            parts: name -> (shape of the part, the boxes that make it up).
            padding_of: the files whose padding is checked as well; None checks that of all.

        Raises:
            CheckpointError: there is no such tensor, a box is not inside it, or what was read is damaged.
        """
        fault_point("load.before_read", step=self.step)
        with self._naming_path():
            results, reads = {}, []
            for name, (shape, boxes) in parts.items():
                entry = self.manifest.tensors.get(name)
                if entry is None:
                    raise CheckpointError(f"{MANIFEST_NAME}: there is no tensor {name!r}")
                results[name] = torch.empty(shape, dtype=torch_dtype(entry.dtype))
                covered = 0
                for box in boxes:
                    reads += list(_reads(name, entry, box, results[name]))
                    covered += box.elements
                if covered != results[name].numel():
                    raise CheckpointError(
                        f"tensor {name!r}: its boxes hold {covered} of {results[name].numel()} elements"
                    )
            self._run(reads)
            self._check_padding(self.manifest.files if padding_of is None else padding_of)
            for name, tensor in results.items():
                _check_values(name, tensor)
        return results

    def _run(self, reads: Sequence[_Read]) -> None:
        """Do all reads on a few threads; both the reading and the hashing leave the interpreter lock."""
        # Large chunks first: the last thread to finish then has little left.
        ordered = sorted(reads, key=lambda read: -read[1].bytes)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._read_chunk, ordered):
                pass

    def _read_chunk(self, read: _Read) -> None:
        name, chunk, target, at, source, extent = read
        place = narrow(target, at, extent)
        direct = extent == chunk.shape and place.is_contiguous()
        buffer = place if direct else torch.empty(chunk.shape, dtype=target.dtype)
        view = byte_view(buffer)
        digest = storage.new_hash()
        for start in range(0, chunk.bytes, storage.SLICE_BYTES):
            part = view[start : start + storage.SLICE_BYTES]
            storage.read_exactly(self._files[chunk.file], part, chunk.at + start, chunk.file)
            digest.update(part)
        if digest.hexdigest() != chunk.xxh3_128:
            raise CheckpointError(
                f"{chunk.file}: tensor {name!r}: bytes {chunk.at} to {chunk.at + chunk.bytes - 1} do not have their "
                f"hash: they were changed after they were saved"
            )
        if not direct:
            place.copy_(narrow(buffer, source, extent))

    def _check_padding(self, files: Iterable[str]) -> None:
        """The few bytes between chunks must be zero: a change anywhere in a file is noticed without a second pass."""
        spans: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
        for entry in self.manifest.tensors.values() if spans else ():
            for chunk in entry.chunks:
                if chunk.file in spans:
                    spans[chunk.file].append((chunk.at, chunk.at + chunk.bytes))
        for name, used in spans.items():
            end = 0
            for start, stop in [*sorted(used), (self.manifest.files[name].bytes, 0)]:
                gap = bytearray(start - end)
                storage.read_exactly(self._files[name], memoryview(gap), end, name)
                if any(gap):
                    raise CheckpointError(f"{name}: the padding at bytes {end} to {start - 1} was changed")
                end = stop


_Read = tuple[str, ChunkEntry, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(name, chunk, tensor to fill, offset in it, offset in the chunk, extent)."""


def _whole(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    origin = (0,) * len(shape)
    return shape, (Box(origin, shape, origin),)


def _reads(name: str, entry: TensorEntry, box: Box, target: torch.Tensor) -> Iterator[_Read]:
    """What must be read of which chunks to fill a box; the chunks tile the tensor, so this covers it."""
    fits = len(box.offset) == len(box.shape) == len(entry.shape)
    if not fits or any(not 0 <= o <= o + s <= n for o, s, n in zip(box.offset, box.shape, entry.shape, strict=True)):
        raise CheckpointError(
            f"tensor {name!r}: the box at {list(box.offset)} of shape {list(box.shape)} "
            f"is not inside {list(entry.shape)}"
        )
    for chunk in entry.chunks:
        spans = list(zip(chunk.offset, chunk.shape, box.offset, box.shape, strict=True))
        low = tuple(max(a, b) for a, _, b, _ in spans)
        extent = tuple(min(a + m, b + n) - start for start, (a, m, b, n) in zip(low, spans, strict=True))
        if all(size > 0 for size in extent):
            place = tuple(start - o + at for start, o, at in zip(low, box.offset, box.at, strict=True))
            source = tuple(start - o for start, o in zip(low, chunk.offset, strict=True))
            yield name, chunk, target, place, source, extent


def _check_values(name: str, tensor: torch.Tensor) -> None:
    """A bool is 0 or 1 in memory; what computes on any other byte is undefined."""
    if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(-1).view(torch.uint8).max()) > 1:
        raise CheckpointError(f"tensor {name!r}: holds bytes that are neither 0 nor 1, so it is not a bool tensor")
