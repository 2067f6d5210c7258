"""How ranks ended, which of them failed first, and the evidence of an out-of-memory kill: pure functions on records."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright.base import errors
from trainwright.base.errors import Interrupted

__all__ = [
    "ERROR_START",
    "Ending",
    "describe_ending",
    "exit_code",
    "first_failure",
    "is_consequence",
    "last_error",
    "memory_kills",
]

ERROR_START = re.compile(
    r"^(\[rank\d+\]:\s?)?(Traceback \(most recent call last\)|error: |terminate called|Fatal Python error|"
    r"\S*(Error|Exception): )",
    re.MULTILINE,
)
"""A line that begins an error: Python's, ours, C++'s; `[rank1]:` is how torch marks the rank."""

_CONSEQUENCE = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Broken pipe|Connection refused|DistNetworkError|DistStoreError|"
    r"recvValue failed|sendBytes failed|failed to recv|Socket closed|ncclRemoteError|remote process exited|"
    r"Application timeout caused pair closure|Timed out waiting \d+ms|wait timeout after|watchdog|"
    r"NCCL communicator was|"
    # our own rooms: a rank that says that it follows another one
    r"another rank failed|died, or gave up waiting for another rank|^error: rank \d+ failed: |FollowedError|RankLost",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Ending:
    """One rank that ended by itself, not because the launcher ended it.

    code: as `Popen.returncode`: the exit code, or minus the signal. ended_at, error_at: monotonic seconds; error_at is
    when its last error began to be written, None when it wrote none. error: the last error text of its output.
    """

    rank: int
    code: int
    ended_at: float
    error_at: float | None = None
    error: str = ""


def exit_code(code: int) -> int:
    """The exit code that a shell would show: 128 + signal for a process that a signal ended."""
    return 128 - code if code < 0 else code


def is_consequence(ending: Ending) -> bool:
    """It failed because another rank was gone: what it wrote is about a lost connection."""
    if ending.code in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE):
        return False
    return _CONSEQUENCE.search(ending.error) is not None


def first_failure(endings: Sequence[Ending]) -> Ending | None:
    """The rank whose failure the others followed; None when all ended well.

    Failures of their own stand before lost connections, and those before ranks that were asked to stop; among equals
    the one whose error was written first, because a rank may take seconds to leave after it wrote its error.
    """
    failed = [ending for ending in endings if ending.code != 0]
    if not failed:
        return None

    def order(ending: Ending) -> tuple[bool, bool, float, int]:
        began = ending.ended_at if ending.error_at is None else ending.error_at
        # Errors within the same 50 ms are the same mistake on every rank: rank 0 speaks for all.
        return ending.code == Interrupted.exit_code, is_consequence(ending), round(began / 0.05), ending.rank

    return min(failed, key=order)


def describe_ending(code: int, *, oom_kills: int = 0) -> str:
    """In words: `exit code 3 (DataError)`, `killed by SIGKILL, likely by the OOM killer: ...`.

    oom_kills: how many processes the kernel killed for memory since the launch (`memory_kills` now minus then).
    """
    if code >= 0:
        names = [name for name in errors.__all__ if name != "TrainwrightError" and _code_of(name) == code]
        return f"exit code {code}" + (f" ({names[0]})" if names else "")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        if oom_kills > 0:
            times = "once" if oom_kills == 1 else f"{oom_kills} times"
            return f"killed by {name}, likely by the OOM killer: it struck {times} since the start, the kernel counts"
        return f"killed by {name}; the kernel counts no out-of-memory kill, so somebody else sent it"
    if -code == signal.SIGBUS and Path("/dev/shm").exists() and shutil.disk_usage("/dev/shm").free < 2**20:
        return f"killed by {name}: /dev/shm is full"
    return f"killed by {name}"


def _code_of(name: str) -> int:
    code: int = getattr(errors, name).exit_code
    return code


def last_error(text: str, *, lines: int = 40) -> str:
    """The error at the end of a rank's output: from where the last run of tracebacks begins, at most `lines` lines."""
    rows = text.rstrip().splitlines()[-lines:]
    starts = [number for number, row in enumerate(rows) if ERROR_START.match(row)]
    tracebacks = [number for number in starts if "Traceback (most" in rows[number]]
    first = (tracebacks or starts or [max(0, len(rows) - 12)])[0]
    return "\n".join(rows[first:])


def memory_kills() -> int:
    """Processes that the kernel killed for lack of memory so far: in this memory cgroup, else on this machine.

    Only differences mean something. 0 where the system does not count them.
    """
    for path in (*_cgroup_event_files(), Path("/proc/vmstat")):
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


def _cgroup_event_files() -> list[Path]:
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(root / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return [*files, root / "memory.events", root / "memory" / "memory.oom_control"]
