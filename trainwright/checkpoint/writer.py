"""Writing a checkpoint so that it exists completely or not at all.

A save goes into a fresh folder `step-N.tmp-<id>` and becomes `step-N` by one rename, after every file, the manifest and
the folder are on the disk. Three steps, so that many ranks can share a save: one rank opens an `Attempt`; each rank
calls `write_pieces` for what it holds; one rank calls `Attempt.commit` with what all of them reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainwright import __version__
from trainwright.base.errors import CheckpointError
from trainwright.base.faults import fault_point
from trainwright.checkpoint import storage
from trainwright.checkpoint.agreement import Cancelled
from trainwright.checkpoint.lock import owner_file, try_lock
from trainwright.checkpoint.manifest import (
    MANIFEST_NAME,
    MAX_STEP,
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    data_file_name,
    encode_manifest,
    parse_manifest,
)
from trainwright.checkpoint.tensors import Piece, byte_view, chunks_of, dtype_name
from trainwright.checkpoint.tree import Json

__all__ = ["Attempt", "Fence", "RankFiles", "write_pieces"]

FILE_BYTES = 8 << 30
"""A data file is closed and the next one begun at 8 GiB: object stores and copy tools like files of this size."""

Fence = Callable[[], None]
"""Called right before the commit; raises when this process may no longer write (see RunLock.check)."""


@dataclass(frozen=True)
class RankFiles:
    """What one rank wrote: its files, and its chunks under the names of the global tensors."""

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def to_json(self) -> Json:
        """For the rank that commits."""
        return {
            "files": {name: [entry.bytes, entry.xxh3_128] for name, entry in self.files.items()},
            "tensors": {
                name: [entry.dtype, entry.shape, [dataclasses.astuple(chunk) for chunk in entry.chunks]]
                for name, entry in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, record: Json) -> RankFiles:
        """The inverse of `to_json`."""
        tensors = {}
        for name, (dtype, shape, chunks) in record["tensors"].items():
            entries = (
                ChunkEntry(file, at, size, tuple(offset), tuple(extent), digest)
                for file, at, size, offset, extent, digest in chunks
            )
            tensors[name] = TensorEntry(dtype, tuple(shape), tuple(entries))
        return cls({name: FileEntry(*entry) for name, entry in record["files"].items()}, tensors)


# --- one attempt ----------------------------------------------------------------------------------------------------


class Attempt:
    """One temporary folder on its way to become `step-N`. Leaving the context without a commit removes it.

    Beside the folder lies `step-N.tmp-<id>.owner`, locked while this process lives: whoever can lock it knows that the
    attempt is dead and may remove it.
    """

    def __init__(self, root: Path, step: int, owner: int, folder: Path) -> None:
        self.root = root
        self.step = step
        self.folder = folder
        self._owner = owner

    @classmethod
    def open(cls, root: Path, step: int, bytes_needed: int) -> Attempt:
        """Make the folder, after a look at the free space.

        Raises:
            CheckpointError: the step is no step, or there is too little space.
            OSError: the folder cannot be made.
        """
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise CheckpointError(f"a checkpoint's step must be a whole number from 0 to 10^18, not {step!r}")
        root.mkdir(parents=True, exist_ok=True)
        storage.check_free_space(root, bytes_needed)
        folder = root / f"step-{step}.tmp-{uuid.uuid4().hex}"
        owner = storage.create_file(owner_file(folder))
        try:
            try_lock(owner)
            storage.make_folder(folder)
        except BaseException:
            os.close(owner)
            storage.remove_file(owner_file(folder))
            raise
        return cls(root, step, owner, folder)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        # After a commit the name is free, or holds the checkpoint that was replaced. A disk that fails here must not
        # hide the error that led here; what stays is litter, which the next start collects.
        with contextlib.suppress(OSError):
            storage.remove_tree(self.folder)
            storage.remove_file(owner_file(self.folder))
        os.close(self._owner)

    def commit(self, ranks: Sequence[RankFiles], state: Json, meta: Json, *, fence: Fence | None = None) -> Path:
        """Check that the ranks together wrote every tensor exactly once, write the manifest, and rename.

        Raises:
            CheckpointError: the chunks do not tile the tensors, a file does not have its size, or `fence` refused.
        """
        fault_point("save.before_manifest", step=self.step, rank=0)
        manifest = _merge(self.step, ranks, state, meta)
        data = encode_manifest(manifest)
        parse_manifest(data)  # the same checks as at load: what is committed can be read
        self._write_manifest(data)
        self._check_sizes(manifest)
        storage.sync_folder(self.folder)
        fault_point("save.before_commit", step=self.step, rank=0)
        if fence is not None:
            fence()
        final = self.root / f"step-{self.step}"
        self._publish(final)
        storage.sync_folder(self.root)
        fault_point("save.after_commit", step=self.step, rank=0)
        return final

    def _write_manifest(self, data: bytes) -> None:
        temporary = self.folder / f"{MANIFEST_NAME}.tmp"
        descriptor = storage.create_file(temporary)
        try:
            storage.write_all(descriptor, data)
            storage.sync(descriptor)
        finally:
            storage.close(descriptor)
        storage.rename(temporary, self.folder / MANIFEST_NAME)

    def _check_sizes(self, manifest: Manifest) -> None:
        found = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.name != MANIFEST_NAME}
        stated = {name: entry.bytes for name, entry in manifest.files.items()}
        if found != stated:
            odd = sorted(dict(found.items() ^ stated.items()))
            raise CheckpointError(f"the files on the disk are not those that were written: {', '.join(odd)}")

    def _publish(self, final: Path) -> None:
        if not os.path.lexists(final):
            storage.rename(self.folder, final)
        elif not storage.exchange(self.folder, final):
            replaced = self.root / f".trash-step-{self.step}-{uuid.uuid4().hex}"
            storage.rename(final, replaced)
            storage.rename(self.folder, final)
            storage.sync_folder(self.root)
            storage.remove_tree(replaced)


def _merge(step: int, ranks: Sequence[RankFiles], state: Json, meta: Json) -> Manifest:
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for written in ranks:
        if files.keys() & written.files.keys():
            raise CheckpointError(f"two ranks wrote the file {sorted(files.keys() & written.files.keys())[0]}")
        files.update(written.files)
        for name, entry in written.tensors.items():
            known = tensors.setdefault(name, TensorEntry(entry.dtype, entry.shape, ()))
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"tensor {name!r}: the ranks do not agree on it: {known.dtype} {list(known.shape)} "
                    f"and {entry.dtype} {list(entry.shape)}"
                )
            tensors[name] = TensorEntry(entry.dtype, entry.shape, known.chunks + entry.chunks)
    versions = {"trainwright": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return Manifest(step, time.time(), versions, len(ranks), meta, state, files, tensors)


# --- data files -----------------------------------------------------------------------------------------------------


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Sequence[Piece],
    *,
    step: int,
    cancelled: Callable[[], bool] = lambda: False,
    file_bytes: int = FILE_BYTES,
) -> RankFiles:
    """Write what one rank holds into new files of `folder`, each on the disk when this returns.

    Args:
        file_bytes: a file that has reached this size is closed and another begun.

    Raises:
        CheckpointError: a tensor cannot be stored. Cancelled: `cancelled()` became true.
        OSError: the disk is full or fails.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    current: _DataFile | None = None

    def close(file: _DataFile) -> None:
        files[file.name] = file.finish()
        fault_point("save.after_data_file", step=step, rank=rank, file=file.name)

    try:
        fault_point("save.before_data", step=step, rank=rank)
        for piece in pieces:
            chunks: list[ChunkEntry] = []
            known = tensors.get(piece.name)
            dtype = dtype_name(piece.tensor, piece.name)
            for offset, part in chunks_of(piece.tensor):
                if current is not None and current.position >= file_bytes:
                    close(current)
                    current = None
                if current is None:
                    current = _DataFile(folder, data_file_name(rank, len(files)), cancelled)
                at, size, digest = current.append(byte_view(part))
                place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
                chunks.append(ChunkEntry(current.name, at, size, place, tuple(part.shape), digest))
            before = known.chunks if known is not None else ()
            tensors[piece.name] = TensorEntry(dtype, tuple(piece.global_shape), (*before, *chunks))
        if current is not None:
            close(current)
    except OSError as error:
        if error.filename is None:  # which file it was; the system does not say it of an open one
            error.filename = str(folder / (current.name if current is not None else data_file_name(rank, len(files))))
        raise
    finally:
        if current is not None:
            current.abandon()
    return RankFiles(files, tensors)


class _DataFile:
    """Appends aligned chunks to one new file through a buffer of whole blocks, hashing the stream as it goes.

    Copies, hashes and writes all leave the interpreter lock to the training thread.
    """

    def __init__(self, folder: Path, name: str, cancelled: Callable[[], bool]) -> None:
        self.name = name
        self.position = 0
        self._cancelled = cancelled
        self._hash = storage.new_hash()
        # Anonymous maps begin at a page, as direct writes need it. numpy copies without the interpreter lock, and
        # without calling in threads, as torch would: they would compete with those that training computes with.
        self._buffer = np.frombuffer(mmap.mmap(-1, storage.SLICE_BYTES), dtype=np.uint8)
        self._used = 0
        self._descriptor: int | None = storage.create_file(folder / name, direct=True)

    def append(self, data: memoryview) -> tuple[int, int, str]:
        """Write one chunk; returns (position, bytes, hash)."""
        # Pages for large chunks, so that they can be mapped or read directly; cache lines for scalars, of which an
        # optimizer has hundreds.
        padding = -self.position % (4096 if len(data) >= 4096 else 64)
        if padding:
            self._put(np.zeros(padding, dtype=np.uint8))
        at = self.position
        chunk_hash = storage.new_hash()
        for start in range(0, len(data), storage.SLICE_BYTES):
            if self._cancelled():
                raise Cancelled("the save was stopped before it was complete")
            part = data[start : start + storage.SLICE_BYTES]
            chunk_hash.update(part)
            self._put(np.frombuffer(part, dtype=np.uint8))
        return at, len(data), chunk_hash.hexdigest()

    def _put(self, part: np.ndarray) -> None:
        done = 0
        while done < len(part):
            count = min(len(part) - done, len(self._buffer) - self._used)
            np.copyto(self._buffer[self._used : self._used + count], part[done : done + count])
            done += count
            self._used += count
            if self._used == len(self._buffer):
                self._flush()
        self.position += len(part)

    def _flush(self) -> None:
        assert self._descriptor is not None
        block = self._buffer[: self._used].data
        self._hash.update(block)
        storage.write_all(self._descriptor, block)
        self._used = 0

    def finish(self) -> FileEntry:
        """Force the file to the disk and close it."""
        self._flush()
        assert self._descriptor is not None
        storage.sync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, None
        storage.close(descriptor)
        return FileEntry(self.position, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close after a failure; does nothing after `finish`."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            storage.close(descriptor)
