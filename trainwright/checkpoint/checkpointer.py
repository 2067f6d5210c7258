"""Periodic saving during a run: in the background, one at a time, never stopping training for one failed save."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainwright.base.errors import CheckpointError, RunInUseError, TrainwrightError
from trainwright.base.events import emit
from trainwright.checkpoint import discovery, loading
from trainwright.checkpoint.agreement import Agreement, Cancelled, RankLost
from trainwright.checkpoint.lock import RunLock
from trainwright.checkpoint.plan import Planner, pieces_of
from trainwright.checkpoint.retention import apply_retention, collect_litter, set_aside_after
from trainwright.checkpoint.saving import Saved, write_together
from trainwright.checkpoint.snapshot import HostSnapshot
from trainwright.checkpoint.tensors import Piece
from trainwright.checkpoint.tree import Json, Leaves, leaves_of, plain_tree
from trainwright.checkpoint.validation import step_of
from trainwright.comm import ALONE, Ranks

__all__ = ["Checkpointer"]

EXIT_DEADLINE_SECONDS = 60.0
"""How long the end of the process waits for a save in flight: schedulers send SIGKILL 30 to 120 s after SIGTERM."""

WRITER_NICENESS = 10
"""The writer thread takes what training leaves: at 10, Linux gives it a tenth of the share of a training thread."""


@dataclass(frozen=True)
class _Job:
    """One save: what this rank writes, and what rank 0 puts into the manifest."""

    step: int
    tree: Json
    meta: Json
    pieces: list[Piece]
    bytes_needed: int
    failed: Exception | None = None


class Checkpointer:
    """Saves to `folder/step-N`, keeps the newest, and finds the one to resume from.

    Args:
        folder: where the `step-N` folders lie. What dead processes left there is collected now.
        keep: how many of the newest complete checkpoints stay; None keeps all.
        asynchronous: copy the state to host memory (as large as the state), return, and write in a thread. The files
            are the same, byte for byte, as those of a synchronous save.
        keep_every: checkpoints whose step it divides stay for good.
        when_busy: a save that comes while one is in flight waits for it ("wait") or does not happen and emits a
            `warning` ("skip"). A required save always waits.
        max_failures: this many periodic saves may fail in a row, the last of them raises. Each failure emits
            `checkpoint.failed`; training goes on after the ones before.
        lock: the run's lock; a process that lost it cannot commit. Of several ranks, rank 0 holds it.
        ranks: all of them make a Checkpointer of the same folder, and call `prepare`, `save`, `load` and the like at
            the same steps. Each writes and reads its part; they fail and succeed together. Rank 0 emits the events.

    What a save writes is bitwise the state at the call of `save`: when that returns, the tensors may change.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int | None = 3,
        asynchronous: bool = True,
        keep_every: int | None = None,
        when_busy: Literal["wait", "skip"] = "wait",
        max_failures: int = 3,
        lock: RunLock | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep}: at least one checkpoint is kept; None keeps all")
        if when_busy not in ("wait", "skip"):
            raise CheckpointError(f"when_busy={when_busy!r}: expected 'wait' or 'skip'")
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self.when_busy = when_busy
        self.max_failures = max_failures
        self.last_saved: Saved | None = None
        self._lock = lock
        self._protected: set[int] = set()
        self._loaded: int | None = None
        self._snapshot = HostSnapshot()
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._error: TrainwrightError | None = None
        self._failures = 0
        self._closed = False
        self._ranks = ranks
        if ranks.is_first:
            self._collect_litter()
        # Saves have a group of their own: their thread must never meet a collective of training.
        self._agreement = Agreement(ranks.separate(), own=True)
        self._planner = Planner(self._agreement)
        _open_checkpointers.add(self)

    def _collect_litter(self) -> None:
        try:
            collect_litter(self.folder)
        except OSError as error:  # a folder that can only be read can still be loaded from
            message = f"what unfinished saves left in {self.folder} could not be removed: {error}"
            emit("warning", code="checkpoint.litter", message=message)

    # --- saving ---

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Plan who writes what, and allocate the host buffers of asynchronous saves now, so that the first save does
        not stall for it. All ranks call it.

        Raises:
            CheckpointError: the state holds what cannot be saved, or the ranks do not hold parts of one state.
        """
        leaves, error = _leaves_or_error(state)
        plan = self._planner.plan(0, error or leaves)
        if not self.asynchronous:
            return
        try:
            self._snapshot.prepare(_by_place(pieces_of(leaves.tensors, plan)))
        except Exception as caught:
            error = caught
        self._agreement.settle(error)

    def save(
        self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any] | None = None, *, required: bool = False
    ) -> bool:
        """Save the state of a step; returns whether the save was begun (asynchronous) or is on the disk (synchronous).

        Args:
            required: for the last save of a run, or before a stop: complete and on the disk when this returns, and an
                error is raised at once.

        Raises:
            CheckpointError: the state holds what cannot be saved; a required save failed; or `max_failures` periodic
                saves in a row did.
            RunInUseError: this process lost the lock of the run folder.
        """
        started = time.monotonic()
        if self._closed:
            raise CheckpointError("this Checkpointer was closed; nothing can be saved with it")
        if self.when_busy == "skip" and not required and self._ranks.any(self.is_busy):
            message = f"the checkpoint of step {step} is skipped: the one before is still being written"
            self._emit("warning", code="checkpoint.skipped", message=message, step=step)
            return False
        self._join(None)
        if not required:
            self._raise_if_hopeless()
        job = self._job(step, state, meta or {})
        if not self.asynchronous:
            self._write(job, started, None)
        else:
            job = self._with_copies(job)
            stall = time.monotonic() - started
            self._thread = threading.Thread(
                target=self._write_in_background,
                args=(job, started, stall),
                name=f"checkpoint-step-{step}",
                daemon=True,  # the end of the process waits in `close`, with a deadline, instead of without one
            )
            self._thread.start()
        if required:
            self.wait()
        if self.asynchronous:
            return True
        self._raise_if_hopeless()
        return self._error is None

    def _job(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> _Job:
        leaves, error = _leaves_or_error(state)
        plain_meta: Json = {}
        try:
            plain_meta = plain_tree(meta)
        except CheckpointError as caught:
            error = error or caught
        plan = self._planner.plan(step, error or leaves)
        tree = self._planner.tree(plan, leaves)
        return _Job(step, tree, plain_meta, pieces_of(leaves.tensors, plan), plan.bytes_needed)

    def _with_copies(self, job: _Job) -> _Job:
        """The job with its tensors copied to the host; only what this rank writes is copied."""
        try:
            copies = self._snapshot.take(_by_place(job.pieces))
        except Exception as error:  # the others are waiting: they must hear of it
            if self._ranks.world == 1:
                raise
            return replace(job, pieces=[], failed=error)
        return replace(job, pieces=[replace(piece, tensor=copies[_place(piece)]) for piece in job.pieces])

    @property
    def is_busy(self) -> bool:
        """A save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: the latest save failed, as it failed.
            RunInUseError: it failed because this process lost the lock of the run folder.
        """
        self._join(None)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, deadline_seconds: float = EXIT_DEADLINE_SECONDS) -> bool:
        """Wait for the save in flight, but no longer than the deadline; then stop it. Returns whether nothing was lost.

        A save that was stopped leaves nothing behind and emits `checkpoint.failed`. Closing twice is fine. Of several
        ranks all close; one that is stopped stops the save of all.
        """
        self._closed = True
        _open_checkpointers.discard(self)
        if not self._join(deadline_seconds):
            self._cancel.set()
            # Between two slices it stops in milliseconds; inside a system call that hangs it is left to the system.
            self._join(1.0)
        if not self.is_busy:
            self._snapshot.release()
            self._agreement.close()
        return self._error is None and not self.is_busy

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _join(self, timeout: float | None) -> bool:
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _write_in_background(self, job: _Job, started: float, stall: float) -> None:
        if sys.platform.startswith("linux"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)  # of this thread only
        self._write(job, started, stall)

    def _write(self, job: _Job, started: float, stall: float | None) -> None:
        """Write, note the outcome for the next `save` or `wait`, tell the listeners."""
        try:
            saved = write_together(
                self._agreement,
                self.folder,
                job.step,
                job.tree,
                job.meta,
                job.pieces,
                job.bytes_needed,
                fence=self._lock.check if self._lock is not None else None,
                cancelled=self._cancel.is_set,
                failed=job.failed,
            )
        except Exception as error:  # whatever it is, it is raised by `wait` or counted by `save`
            self._note_failure(job.step, error)
            return
        self.last_saved, self._error, self._failures = saved, None, 0
        self._emit(
            "checkpoint.saved",
            step=job.step,
            path=str(saved.path),
            bytes=saved.bytes,
            seconds=saved.seconds,
            stall_seconds=time.monotonic() - started if stall is None else stall,
        )
        if self._ranks.is_first:
            self._retain(job.step)

    def _emit(self, kind: str, **fields: Any) -> None:
        """Rank 0 speaks for all."""
        if self._ranks.is_first:
            emit(kind, **fields)

    def _note_failure(self, step: int, error: Exception) -> None:
        self._failures += 1
        if isinstance(error, TrainwrightError):
            self._error = error
        else:
            self._error = CheckpointError(f"checkpoint of step {step} failed: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        reason = "stopped at exit before it was complete" if isinstance(error, Cancelled) else str(self._error)
        tell = emit if isinstance(error, RankLost) else self._emit  # rank 0 may be the one that is lost
        tell("checkpoint.failed", step=step, path=str(self.folder), reason=reason, failures_in_a_row=self._failures)

    def _raise_if_hopeless(self) -> None:
        if self._error is None or self.is_busy:
            return
        if isinstance(self._error, RunInUseError):
            raise self._error  # somebody else writes here now: waiting will not mend it
        if self._failures >= self.max_failures:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be saved; the last error: {self._error.message}",
                hint=self._error.hint or "mend the disk and resume from the last good checkpoint",
            ) from self._error

    def _retain(self, step: int) -> None:
        if self.keep is None:
            return
        try:
            protected = self._protected | ({self._loaded} if self._loaded is not None else set())
            apply_retention(self.folder, step, keep=self.keep, keep_every=self.keep_every, protected=protected)
        except (
            Exception
        ) as error:  # the new checkpoint is safe; that an old one could not be deleted must not stop training
            message = f"old checkpoints in {self.folder} could not be deleted: {error}"
            emit("warning", code="checkpoint.retention", message=message, step=step)

    # --- finding and loading ---

    def checkpoints(self) -> list[discovery.CheckpointInfo]:
        """Every `step-N` of the folder, oldest first, damaged ones included."""
        return discovery.list_checkpoints(self.folder)

    def latest(self, *, deep: bool = True) -> Path | None:
        """The newest checkpoint that can be believed (see discovery.latest); protected from retention from now on."""
        found, error = None, None
        try:
            if self._ranks.is_first:
                found = discovery.latest(self.folder, deep=deep)
        except CheckpointError as caught:
            error = caught
        loading.agree(self._ranks, error)
        name = self._ranks.broadcast_json(found.name if found is not None else None)
        path = self.folder / name if name is not None else None
        if path is not None:
            self._protect_path(path)
        return path

    def load(self, path: Path | str, *, like: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """`load_checkpoint`; the checkpoint is protected from retention from now on, if it is one of this folder."""
        loaded = loading.load_checkpoint(path, like=like, ranks=self._ranks)
        self._protect_path(Path(path))
        return loaded

    def load_latest(self, *, like: Mapping[str, Any] | None = None) -> loading.Loaded | None:
        """`load_latest` of this folder: reads once, steps back over damaged ones, which it reports by name."""
        loaded = loading.load_latest(self.folder, like=like, ranks=self._ranks)
        if loaded is not None:
            self._protect_path(loaded.path)
        return loaded

    def protect(self, step: int) -> None:
        """Keep a checkpoint (the best one, say) whatever retention says, as long as this process lives."""
        self._protected.add(step)

    def unprotect(self, step: int) -> None:
        """Leave a checkpoint to retention again."""
        self._protected.discard(step)

    def rewind(self, step: int) -> list[Path]:
        """For a run that goes back to `step` on purpose: set newer checkpoints aside (renamed, not deleted)."""
        self._join(None)
        moved: list[Path] = []
        error = None
        try:
            if self._ranks.is_first:
                moved = set_aside_after(self.folder, step)
        except OSError as caught:
            if self._ranks.world == 1:
                raise
            error = caught
        loading.agree(self._ranks, error)
        return [self.folder / name for name in self._ranks.broadcast_json([path.name for path in moved])]

    def _protect_path(self, path: Path) -> None:
        step = step_of(path.name)
        if step is not None and path.parent.resolve() == self.folder.resolve():
            # The one that was loaded last: should the new ones turn out bad, it is known to be good.
            self._loaded = step


def _leaves_or_error(state: Mapping[str, Any]) -> tuple[Leaves, Exception | None]:
    try:
        return leaves_of(state), None
    except CheckpointError as error:
        return Leaves({}, {}, {}), error


def _by_place(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    return {_place(piece): piece.tensor for piece in pieces}


def _place(piece: Piece) -> str:
    return f"{piece.name} at {piece.offset}" if any(piece.offset) else piece.name


_open_checkpointers: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@atexit.register
def _drain_at_exit() -> None:
    for checkpointer in list(_open_checkpointers):
        checkpointer.close()
