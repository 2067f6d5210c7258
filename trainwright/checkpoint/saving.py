"""A save of all ranks: a plan of who writes what, one attempt, one commit; they succeed together or fail together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.base.errors import CheckpointError
from trainwright.base.faults import fault_point
from trainwright.checkpoint.agreement import Agreement, failure_of
from trainwright.checkpoint.plan import Planner, pieces_of
from trainwright.checkpoint.tensors import Piece
from trainwright.checkpoint.tree import Json, leaves_of, plain_tree
from trainwright.checkpoint.writer import Attempt, Fence, RankFiles, write_pieces
from trainwright.comm import ALONE, Ranks

__all__ = ["Saved", "save_checkpoint", "write_together"]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its folder, the bytes of its data files, and the seconds that writing took."""

    step: int
    path: Path
    bytes: int
    seconds: float


def save_checkpoint(
    root: Path | str,
    step: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    *,
    fence: Fence | None = None,
    ranks: Ranks = ALONE,
) -> Saved:
    """Write `state` as `root/step-N`, and return when it is on the disk.

    An existing `step-N` is replaced in one atomic step, after the new one is complete.

    Args:
        ranks: all of them call this with their part of the state: DTensors where it is sharded, equal plain tensors
            where it is not.

    Raises:
        CheckpointError: the state holds what cannot be saved, the disk is full or fails, or `fence` refused; on all
            ranks alike. Nothing of the attempt is left and earlier checkpoints are untouched.
    """
    agreement = Agreement(ranks)
    leaves = leaves_of(state)
    planner = Planner(agreement)
    plan = planner.plan(step, leaves)
    tree = planner.tree(plan, leaves)
    pieces = pieces_of(leaves.tensors, plan)
    return write_together(
        agreement, Path(root), step, tree, plain_tree(meta or {}), pieces, plan.bytes_needed, fence=fence
    )


def write_together(
    agreement: Agreement,
    root: Path,
    step: int,
    tree: Json,
    meta: Json,
    pieces: Sequence[Piece],
    bytes_needed: int,
    *,
    fence: Fence | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    failed: Exception | None = None,
) -> Saved:
    """One save of all ranks: each writes its pieces, rank 0 commits with its own tree and meta when all have.

    Args:
        cancelled: asked every few MiB; raises Cancelled if true.
        failed: what went wrong on this rank before; the others are told, and nothing is saved.

    Raises:
        CheckpointError: on all ranks alike, when any of them failed; names rank, host and file.
    """
    started = time.monotonic()
    rank = agreement.ranks.rank
    with contextlib.ExitStack() as stack:
        attempt, error = None, failed
        if agreement.leads:
            try:
                with _as_checkpoint_errors(root, step):
                    attempt = stack.enter_context(Attempt.open(root, step, bytes_needed))
            except Exception as caught:
                error = error or caught
        opened = agreement.announce(
            {"folder": attempt.folder.name, "failure": None}
            if attempt is not None
            else {"folder": None, "failure": agreement.first_failures([_report(error)]) if error else None}
        )
        agreement.raise_for(opened["failure"], error)
        written = RankFiles({}, {})
        try:
            if error is not None:
                raise error
            with _as_checkpoint_errors(root, step):
                written = write_pieces(root / opened["folder"], rank, pieces, step=step, cancelled=cancelled)
            fault_point("save.before_report", step=step, rank=rank)
        except Exception as caught:
            error = caught
        reports = agreement.collect(_report(error, written))
        verdict: Json = None
        if attempt is not None:
            verdict, error = _decide(agreement, attempt, reports, tree, meta, fence, error)
        # The attempt is gone before the others hear that it failed.
        stack.close()
        verdict = agreement.announce(verdict)
    agreement.raise_for(verdict["failure"], error)
    return Saved(step, root / f"step-{step}", verdict["bytes"], time.monotonic() - started)


def _report(error: Exception | None, written: RankFiles | None = None) -> Json:
    record = written.to_json() if written is not None and error is None else None
    return {"failure": failure_of(error) if error is not None else None, "written": record}


def _decide(
    agreement: Agreement,
    attempt: Attempt,
    reports: Sequence[Json],
    tree: Json,
    meta: Json,
    fence: Fence | None,
    error: Exception | None,
) -> tuple[Json, Exception | None]:
    """Commit if every rank has written its part: (what to tell them, this rank's own error)."""
    failure = agreement.first_failures(reports)
    if failure is None:
        written = [RankFiles.from_json(report["written"]) for report in reports]
        try:
            with _as_checkpoint_errors(attempt.root, attempt.step):
                attempt.commit(written, tree, meta, fence=fence)
        except Exception as caught:
            error, failure = caught, agreement.first_failures([_report(caught)])
        else:
            total = sum(entry.bytes for files in written for entry in files.files.values())
            return {"failure": None, "bytes": total}, None
    return {"failure": failure, "bytes": 0}, error


@contextlib.contextmanager
def _as_checkpoint_errors(root: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = f"{Path(os.fsdecode(error.filename)).name}: " if isinstance(error.filename, (str, bytes)) else ""
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {root}: {file}{error.strerror or error}",
            hint="earlier checkpoints are untouched and nothing of this one is left; "
            "check the free space, the quota and the permissions of that folder, and that all ranks see the same one",
        ) from error
