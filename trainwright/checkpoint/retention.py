"""Which checkpoints stay, and how the others go: never the last good one, never one that is in use."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Collection
from pathlib import Path

from trainwright.base.errors import CheckpointError
from trainwright.base.events import emit
from trainwright.base.faults import fault_point
from trainwright.checkpoint import storage
from trainwright.checkpoint.discovery import step_folders
from trainwright.checkpoint.lock import owner_file, try_lock
from trainwright.checkpoint.validation import inspect

__all__ = ["apply_retention", "collect_litter", "set_aside_after", "steps_to_delete"]

_ATTEMPT = re.compile(r"step-[0-9]{1,19}\.tmp-[0-9a-f]{32}")
_TRASH = re.compile(r"\.trash-step-[0-9]{1,19}-[0-9a-f]{32}")

UNOWNED_SECONDS = 3600
"""An attempt whose owner file is gone (it was removed by hand) counts as dead after an hour without a change."""


def steps_to_delete(
    good: Collection[int],
    damaged: Collection[int],
    *,
    keep: int,
    keep_every: int | None = None,
    protected: Collection[int] = (),
) -> list[int]:
    """The steps that retention lets go, oldest first. Pure.

    The newest `keep` good ones stay, those whose step `keep_every` divides, and the protected ones. Damaged ones do not
    count as kept; they go once `keep` good ones are newer, because until then they may be all there is to rescue.
    """
    newest = sorted(good, reverse=True)[: max(keep, 1)]
    if len(newest) < max(keep, 1):
        return []
    stays = {*newest, *protected}
    every = [step for step in good if keep_every and step % keep_every == 0]
    return [step for step in sorted({*good, *damaged}) if step < newest[-1] and step not in stays and step not in every]


def apply_retention(
    root: Path, step: int, *, keep: int, keep_every: int | None = None, protected: Collection[int] = ()
) -> list[Path]:
    """Delete what `steps_to_delete` names; returns the paths that are gone.

    Call it after the commit of `step`, which stays whatever its number. A checkpoint is renamed out of sight
    before its files are removed, so that a half-deleted one is never seen.
    """
    fault_point("save.before_retention", step=step, rank=0)
    folders = dict(step_folders(root))
    good, damaged = [], []
    for number, path in folders.items():
        try:
            inspect(path)
            good.append(number)
        except CheckpointError:
            damaged.append(number)
    gone = []
    stays = {step, *protected}
    for old in steps_to_delete(good, damaged, keep=keep, keep_every=keep_every, protected=stays):
        trash = root / f".trash-step-{old}-{uuid.uuid4().hex}"
        storage.rename(folders[old], trash)
        storage.remove_tree(trash)
        gone.append(folders[old])
    return gone


def collect_litter(root: Path) -> list[Path]:
    """Remove what dead processes left: unfinished attempts and half-deleted checkpoints. Returns what was removed.

    An attempt belongs to a living process exactly as long as its owner file is locked.
    """
    if not root.is_dir():
        return []
    removed = []
    for name in sorted(os.listdir(root)):
        path = root / name
        if _TRASH.fullmatch(name) or (_ATTEMPT.fullmatch(name) and _owner_is_dead(path)):
            storage.remove_tree(path)
            storage.remove_file(owner_file(path))
            removed.append(path)
    for name in sorted(os.listdir(root)):
        if name.endswith(".owner") and _ATTEMPT.fullmatch(name.removesuffix(".owner")):
            folder = root / name.removesuffix(".owner")
            if not folder.exists() and _owner_is_dead(folder):
                storage.remove_file(root / name)
    if removed:
        emit(
            "warning",
            code="checkpoint.litter",
            message=f"removed {len(removed)} unfinished or half-deleted checkpoints in {root}: "
            + ", ".join(path.name for path in removed[:5]),
        )
    return removed


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints that are newer than `step` to `step-N.superseded-<id>`: discovery then passes them over.

    For a run that goes back on purpose: its next checkpoints would otherwise be older than those of the abandoned
    branch. Nothing is deleted. Returns the new paths.
    """
    moved = []
    for newer, path in step_folders(root):
        if newer > step:
            moved.append(path.with_name(f"{path.name}.superseded-{uuid.uuid4().hex}"))
            storage.rename(path, moved[-1])
    if moved:
        storage.sync_folder(root)
    return moved


def _owner_is_dead(attempt: Path) -> bool:
    try:
        descriptor = os.open(owner_file(attempt), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - attempt.stat().st_mtime > UNOWNED_SECONDS
        return True
    try:
        return try_lock(descriptor) is True
    finally:
        os.close(descriptor)
