"""Reads the heartbeats and the evidence of all ranks of this machine from their folder."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.launch.hang import RankReport
from trainwright.launch.heartbeat import STACK_SIGNAL

__all__ = ["Beat", "process_state", "rank_reports", "read_heartbeats", "request_evidence", "stalled"]


@dataclass(frozen=True)
class Beat:
    """One rank's last heartbeat. created, beat: monotonic seconds of its start and of its last progress, if any."""

    rank: int
    world: int
    pid: int
    main_thread: int
    step: int
    phase: str
    created: float
    beat: float | None
    paused_until: float


def read_heartbeats(folder: Path) -> list[Beat]:
    """What the ranks last wrote, by rank; files that cannot be read are passed over."""
    found = []
    for path in folder.glob("heartbeat-*.json"):
        record = _read_json(path)
        if record is not None:
            try:
                found.append(Beat(**record))
            except TypeError:  # written by another version
                continue
    newest = max(found, key=lambda beat: beat.beat or 0.0, default=None)
    # An earlier run with more ranks may have left files in a folder that is used again.
    return sorted((beat for beat in found if newest and beat.rank < newest.world), key=lambda beat: beat.rank)


def stalled(beats: list[Beat], hang_after: float, now: float) -> bool:
    """No rank made progress for `hang_after` seconds.

    As long as one does, the others may be waiting for it and nothing hangs; a rank that hangs stops all of them at
    their next collective. While no rank has beaten, all are still starting. A pause holds for everybody.
    """
    if all(beat.beat is None for beat in beats) or any(beat.paused_until > now for beat in beats):
        return False
    return all(now - (beat.created if beat.beat is None else beat.beat) > hang_after for beat in beats)


def request_evidence(folder: Path) -> None:
    """Ask every rank for its stacks and its flight recorder; they answer within a second unless they are stopped."""
    (folder / "dump").touch()
    for beat in read_heartbeats(folder):
        if STACK_SIGNAL is not None and process_state(beat.pid) not in ("gone", "stopped"):
            try:
                os.kill(beat.pid, STACK_SIGNAL)
            except ProcessLookupError:
                continue


def evidence_complete(folder: Path) -> bool:
    """Every rank that can answer has answered."""
    return all(
        (folder / f"flight-{beat.rank}.json").exists() and (folder / f"stack-{beat.rank}.txt").stat().st_size > 0
        for beat in read_heartbeats(folder)
        if process_state(beat.pid) == "running"
    )


def rank_reports(folder: Path) -> list[RankReport]:
    """Everything known of every rank that has a heartbeat in `folder`."""
    now = time.monotonic()
    reports = []
    for beat in read_heartbeats(folder):
        stack_file = folder / f"stack-{beat.rank}.txt"
        stack = stack_file.read_text(encoding="utf-8", errors="replace") if stack_file.exists() else ""
        reports.append(
            RankReport(
                rank=beat.rank,
                pid=beat.pid,
                state=process_state(beat.pid),
                step=beat.step,
                phase=beat.phase,
                age=now - (beat.created if beat.beat is None else beat.beat),
                stack=stack,
                main_thread=beat.main_thread,
                flight=_read_json(folder / f"flight-{beat.rank}.json"),
            )
        )
    return reports


def process_state(pid: int) -> str:
    """`running`, `stopped` (SIGSTOP, or a debugger), `disk` (in an uninterruptible wait) or `gone`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "running" if _alive(pid) else "gone"
    # The name in parentheses may itself hold parentheses and blanks.
    letter = text.rpartition(")")[2].split()[0]
    return {"T": "stopped", "t": "stopped", "D": "disk", "Z": "gone", "X": "gone"}.get(letter, "running")


def _alive(pid: int) -> bool:
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
