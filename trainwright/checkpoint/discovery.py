"""Finding the checkpoints of a run and the newest that can be believed; none of this needs torch.

Names in a folder are only hints: a checkpoint counts if it passes the checks of validation.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.base.errors import CheckpointError
from trainwright.base.events import emit
from trainwright.checkpoint.tree import unflatten
from trainwright.checkpoint.validation import inspect, refusal, step_of
from trainwright.checkpoint.verification import verify

__all__ = ["CheckpointInfo", "all_refused", "latest", "list_checkpoints", "report_refused", "step_folders"]


@dataclass(frozen=True)
class CheckpointInfo:
    """One `step-N` folder. `complete` is False when it cannot be believed, and `problem` says why.

    `bytes` is the size of its data files, `time` seconds since the epoch; both 0 when incomplete.
    """

    step: int
    path: Path
    complete: bool
    bytes: int = 0
    time: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """All `step-N` in a folder, newest step first; empty when there is no such folder."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(((step, root / name) for name in names if (step := step_of(name)) is not None), reverse=True)


def list_checkpoints(root: Path | str) -> list[CheckpointInfo]:
    """Every `step-N` in a folder, oldest first, damaged ones included. Sizes are checked, bytes are not read."""
    return [_info(step, path) for step, path in reversed(step_folders(Path(root)))]


def _info(step: int, path: Path) -> CheckpointInfo:
    try:
        manifest = inspect(path)
    except CheckpointError as error:
        return CheckpointInfo(step, path, complete=False, problem=error.message)
    meta = unflatten(manifest.meta, {}, what="meta")
    return CheckpointInfo(step, path, True, manifest.bytes, manifest.created, meta, manifest.versions)


def latest(root: Path | str, *, deep: bool = True) -> Path | None:
    """The newest checkpoint that can be believed, or None when there is none at all.

    Newer ones that cannot are reported by name with the event `warning`, and passed over.

    Args:
        deep: read every byte and compare it with its hash. False looks at the manifest and the sizes only;
            `load_latest` reads once and does both.

    Raises:
        CheckpointError: there are checkpoints, but each is damaged. Starting over silently would hide the loss.
    """
    refused: list[CheckpointError] = []
    for path in _believable(Path(root), refused):
        if not deep:
            return path
        report = verify(path)
        if report.ok:
            return path
        refused.append(report_refused(path, refusal(path, "; ".join(map(str, report.problems[:8])))))
    if refused:
        raise all_refused(Path(root), refused)
    return None


def _believable(root: Path, refused: list[CheckpointError]) -> Iterator[Path]:
    for _, path in step_folders(root):
        try:
            inspect(path)
        except CheckpointError as error:
            refused.append(report_refused(path, error))
        else:
            yield path


def report_refused(path: Path, error: CheckpointError) -> CheckpointError:
    """Say by name that a checkpoint is passed over; returns the error for the list of all."""
    emit("warning", code="checkpoint.refused", message=error.message, hint=error.hint, path=str(path))
    return error


def all_refused(root: Path, refused: list[CheckpointError]) -> CheckpointError:
    """The error when checkpoints exist and none can be used."""
    reasons = "\n".join(f"  {error.message}" for error in refused)
    return CheckpointError(
        f"none of the {len(refused)} checkpoints in {root} can be used:\n{reasons}",
        hint="restore one from a backup, or move them away to start from the beginning",
    )
