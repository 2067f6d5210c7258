"""Can this checkpoint be believed? The checks that need no tensor bytes: manifest, names, sizes, kinds of files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import storage
from trainwright.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, parse_manifest

__all__ = ["extra_files", "file_problems", "inspect", "read_manifest", "refusal", "step_of"]

_STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]{0,18})")


def step_of(name: str) -> int | None:
    """12 for "step-12"; None for any other name, temporary and discarded folders included."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def refusal(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that cannot be believed."""
    return CheckpointError(
        f"checkpoint {path} is refused: {reason}",
        hint=f"`trainwright checkpoint verify {path}` lists everything that is wrong with it; "
        "an earlier checkpoint of the run may be good",
    )


def read_manifest(folder: int, path: Path) -> Manifest:
    """The manifest of an open checkpoint folder, fully checked.

    Raises:
        CheckpointError: it is missing or not to be believed, or says another step than the name of the folder.
    """
    manifest = parse_manifest(storage.read_small(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES))
    named = step_of(path.name)
    if named is not None and named != manifest.step:
        raise CheckpointError(f"{MANIFEST_NAME}: it is of step {manifest.step}, the folder is named {path.name}")
    return manifest


def file_problems(folder: int, manifest: Manifest) -> dict[str, str]:
    """Data files that are missing, not plain files or of another size: name -> reason."""
    problems = {}
    for name, entry in manifest.files.items():
        try:
            descriptor, size = storage.open_regular(folder, name)
        except CheckpointError as error:
            problems[name] = error.message.removeprefix(f"{name}: ")
            continue
        os.close(descriptor)
        if size != entry.bytes:
            problems[name] = f"it has {size} bytes, the manifest says {entry.bytes}"
    return problems


def extra_files(folder: int, manifest: Manifest) -> list[str]:
    """Names in the folder that the manifest does not know. They are never opened."""
    return sorted(set(os.listdir(folder)) - manifest.files.keys() - {MANIFEST_NAME})


def inspect(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there with their sizes; bytes are not read.

    Raises:
        CheckpointError: it cannot be believed, with its path, the file and the reason.
    """
    with storage.folder_descriptor(path) as folder:
        try:
            manifest = read_manifest(folder, path)
        except CheckpointError as error:
            raise refusal(path, error.message) from error
        problems = file_problems(folder, manifest)
    if problems:
        raise refusal(path, "; ".join(f"{name}: {reason}" for name, reason in sorted(problems.items())[:8]))
    return manifest
