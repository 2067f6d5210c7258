"""Reading a checkpoint: every byte that is returned was compared with its hash, whatever layout asks for it.

A tensor is read by the boxes of its chunks, so a process that wants a part of a global tensor reads the chunks which
overlap that part and no others. Chunks are read and hashed by a few threads straight into the tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.base.faults import fault_point
from trainwright.checkpoint import storage
from trainwright.checkpoint.discovery import all_refused, report_refused, step_folders
from trainwright.checkpoint.manifest import MANIFEST_NAME, ChunkEntry, Manifest
from trainwright.checkpoint.tensors import byte_view, dtype_name, torch_dtype
from trainwright.checkpoint.tree import flatten, unflatten
from trainwright.checkpoint.validation import file_problems, read_manifest, refusal

__all__ = ["CheckpointReader", "Loaded", "check_same_tensors", "load_checkpoint", "load_latest"]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the state and meta that were saved at `step`."""

    path: Path
    step: int
    state: dict[str, Any]
    meta: dict[str, Any]


def load_checkpoint(
    path: Path | str, *, like: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a whole checkpoint; returns (state, meta) exactly as they were saved, tensors on the host.

    Args:
        like: a state with the tensors that are wanted. Names, dtypes and shapes are compared before a byte is read;
            no value is ever cast or dropped silently.

    Raises:
        CheckpointError: it is damaged, or does not fit `like`; names the file or the tensors.
    """
    with CheckpointReader(path) as reader:
        if like is not None:
            check_same_tensors(reader.manifest, like, reader.path)
        return reader.read_state(), reader.meta


def load_latest(root: Path | str, *, like: Mapping[str, Any] | None = None) -> Loaded | None:
    """Read the newest checkpoint that can be believed; None when there is none at all.

    A damaged one is reported by name with the event `warning`, and the one before it is taken. One that is whole but
    does not fit `like` is an error at once: an older one would not fit either.

    Raises:
        CheckpointError: all are damaged, or the newest good one does not fit `like`.
    """
    root = Path(root)
    refused: list[CheckpointError] = []
    for step, path in step_folders(root):
        try:
            reader = CheckpointReader(path)
        except CheckpointError as error:
            refused.append(report_refused(path, error))
            continue
        with reader:
            if like is not None:
                check_same_tensors(reader.manifest, like, path)
            try:
                return Loaded(path, step, reader.read_state(), reader.meta)
            except CheckpointError as error:
                refused.append(report_refused(path, error))
    if refused:
        raise all_refused(root, refused)
    return None


def check_same_tensors(manifest: Manifest, like: Mapping[str, Any], path: Path) -> None:
    """Compare what a checkpoint holds with what is wanted: names, dtypes and shapes, all differences at once.

    Raises:
        CheckpointError: they differ.
    """
    flat = flatten(like)
    wanted = {name: (dtype_name(t, name), tuple(t.shape)) for name, t in flat.tensors.items()}
    stored = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    lines = []
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            lines.append(f"  {name}: the checkpoint has {_shown(stored.get(name))}, wanted {_shown(wanted.get(name))}")
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise CheckpointError(
            "\n".join([f"checkpoint {path} does not fit what is to be loaded:", *lines[:20], *more]),
            hint="resume with the model and optimizer that the run began with, or start a new run",
        )


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing of this name" if entry is None else f"{entry[0]} {list(entry[1])}"


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
        fault_point("load.before_read", step=self.step)
        entries = self.manifest.tensors
        tensors = {name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype)) for name, entry in entries.items()}
        reads = [
            (name, chunk, tensors[name], chunk.offset, (0,) * len(chunk.offset), chunk.shape)
            for name, entry in entries.items()
            for chunk in entry.chunks
        ]
        with self._naming_path():
            self._run(reads)
            self._check_padding()
            for name, tensor in tensors.items():
                _check_values(name, tensor)
            return unflatten(self.manifest.state, tensors)

    def read_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of a global tensor that begins at `offset`; reads only the chunks that overlap it.

        Raises:
            CheckpointError: there is no such tensor, the box is not inside it, or what was read is damaged.
        """
        with self._naming_path():
            entry = self.manifest.tensors.get(name)
            if entry is None:
                raise CheckpointError(f"{MANIFEST_NAME}: there is no tensor {name!r}")
            fits = len(offset) == len(shape) == len(entry.shape)
            if not fits or any(not 0 <= o <= o + s <= n for o, s, n in zip(offset, shape, entry.shape, strict=True)):
                raise CheckpointError(
                    f"tensor {name!r}: the box at {list(offset)} of shape {list(shape)} is not inside "
                    f"{list(entry.shape)}"
                )
            result = torch.empty(tuple(shape), dtype=torch_dtype(entry.dtype))
            reads = []
            for chunk in entry.chunks:
                low = tuple(max(a, b) for a, b in zip(chunk.offset, offset, strict=True))
                high = tuple(
                    min(a + m, b + n) for a, m, b, n in zip(chunk.offset, chunk.shape, offset, shape, strict=True)
                )
                extent = tuple(h - i for i, h in zip(low, high, strict=True))
                if all(size > 0 for size in extent):
                    target = tuple(i - b for i, b in zip(low, offset, strict=True))
                    source = tuple(i - a for i, a in zip(low, chunk.offset, strict=True))
                    reads.append((name, chunk, result, target, source, extent))
            self._run(reads)
            _check_values(name, result)
        return result

    def _run(self, reads: Sequence[_Read]) -> None:
        """Do all reads on a few threads; both the reading and the hashing leave the interpreter lock."""
        # Large chunks first: the last thread to finish then has little left.
        ordered = sorted(reads, key=lambda read: -read[1].bytes)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._read_chunk, ordered):
                pass

    def _read_chunk(self, read: _Read) -> None:
        name, chunk, target, at, source, extent = read
        place = _box(target, at, extent)
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
            place.copy_(_box(buffer, source, extent))

    def _check_padding(self) -> None:
        """The few bytes between chunks must be zero: a change anywhere in a file is noticed without a second pass."""
        spans: dict[str, list[tuple[int, int]]] = {name: [] for name in self.manifest.files}
        for entry in self.manifest.tensors.values():
            for chunk in entry.chunks:
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


def _box(tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _check_values(name: str, tensor: torch.Tensor) -> None:
    """A bool is 0 or 1 in memory; what computes on any other byte is undefined."""
    if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(-1).view(torch.uint8).max()) > 1:
        raise CheckpointError(f"tensor {name!r}: holds bytes that are neither 0 nor 1, so it is not a bool tensor")
