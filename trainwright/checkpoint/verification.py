"""Reading every byte of a checkpoint and saying everything that is wrong with it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import storage
from trainwright.checkpoint.manifest import MANIFEST_NAME, ChunkEntry, Manifest
from trainwright.checkpoint.validation import extra_files, file_problems, read_manifest

__all__ = ["Problem", "VerifyReport", "verify"]


@dataclass(frozen=True)
class Problem:
    """`file` is wrong; `tensor` names the tensor whose bytes are affected, where one is."""

    file: str
    tensor: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {f'tensor {self.tensor!r}: ' if self.tensor else ''}{self.reason}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: `bytes` were read in `seconds`; `ok` means that not one bit differs from what was saved."""

    path: Path
    step: int | None
    problems: tuple[Problem, ...]
    bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path | str) -> VerifyReport:
    """Read a checkpoint completely and compare everything with its hashes. Raises nothing for a damaged one."""
    path = Path(path)
    started = time.monotonic()
    problems: list[Problem] = []
    read = 0
    step = None
    try:
        with storage.folder_descriptor(path) as folder:
            try:
                manifest = read_manifest(folder, path)
            except CheckpointError as error:
                problems.append(Problem(MANIFEST_NAME, None, error.message.removeprefix(f"{MANIFEST_NAME}: ")))
            else:
                step = manifest.step
                read = _verify_files(folder, manifest, problems)
    except CheckpointError as error:
        problems.append(Problem(path.name, None, error.message))
    return VerifyReport(path, step, tuple(problems), read, time.monotonic() - started)


def _verify_files(folder: int, manifest: Manifest, problems: list[Problem]) -> int:
    bad = file_problems(folder, manifest)
    problems.extend(Problem(name, None, reason) for name, reason in sorted(bad.items()))
    for name in extra_files(folder, manifest):
        problems.append(Problem(name, None, "the manifest does not know this file"))
    spans: dict[str, list[tuple[str, ChunkEntry]]] = {name: [] for name in manifest.files}
    for tensor, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            spans[chunk.file].append((tensor, chunk))
    read = 0
    for name in sorted(manifest.files):
        if name not in bad:
            read += _verify_file(folder, name, manifest, spans[name], problems)
    return read


def _verify_file(
    folder: int, name: str, manifest: Manifest, chunks: list[tuple[str, ChunkEntry]], problems: list[Problem]
) -> int:
    size = manifest.files[name].bytes
    whole = storage.new_hash()
    buffer = memoryview(bytearray(min(storage.SLICE_BYTES, max(size, 1))))
    found = 0
    descriptor, _ = storage.open_regular(folder, name)

    def hash_until(position: int, end: int) -> str:
        own = storage.new_hash()
        while position < end:
            view = buffer[: min(len(buffer), end - position)]
            storage.read_exactly(descriptor, view, position, name)
            whole.update(view)
            own.update(view)
            position += len(view)
        return own.hexdigest()

    try:
        position = 0
        for tensor, chunk in sorted(chunks, key=lambda item: item[1].at):
            hash_until(position, chunk.at)
            position = chunk.at + chunk.bytes
            if hash_until(chunk.at, position) != chunk.xxh3_128:
                found += 1
                reason = f"bytes {chunk.at} to {position - 1} do not have their hash: they were changed"
                problems.append(Problem(name, tensor, reason))
        hash_until(position, size)
    except CheckpointError as error:
        problems.append(Problem(name, None, error.message.removeprefix(f"{name}: ")))
        return position
    finally:
        os.close(descriptor)
    if not found and whole.hexdigest() != manifest.files[name].xxh3_128:
        problems.append(Problem(name, None, "the padding between its tensors was changed"))
    return size
