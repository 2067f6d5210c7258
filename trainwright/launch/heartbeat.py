"""Inside a rank: a thread that tells others how far the training loop is, and takes the evidence when it hangs.

The loop calls `beat`, which only stores three values. The thread writes them to a file about once a second. Asked by
the launcher it dumps torch's flight recorder; Python's stacks are dumped by a signal handler in C, which works while
the main thread hangs in a collective and even when it holds the interpreter lock.
Without our launcher (torchrun, mpirun, srun) the thread watches its own rank, and ends it when it hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from trainwright.base.errors import HangError
from trainwright.base.processes import process_environment

__all__ = [
    "FOLDER_VARIABLE",
    "HANG_VARIABLE",
    "STACK_SIGNAL",
    "Heartbeat",
    "enable_flight_recorder",
    "heartbeat_from_environment",
]

FOLDER_VARIABLE = "TRAINWRIGHT_LAUNCH_FOLDER"
HANG_VARIABLE = "TRAINWRIGHT_HANG_AFTER"
STACK_SIGNAL = getattr(signal, "SIGUSR2", None)
"""Dumps the Python stacks of a rank into its file; Slurm and its users take SIGUSR1 for other things."""

FLIGHT_ENTRIES = "2000"
EVIDENCE_SECONDS = 2.0


def enable_flight_recorder(env: MutableMapping[str, str]) -> None:
    """Make torch record its collectives, gloo's and NCCL's; must happen before the first process group is made."""
    env.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_ENTRIES)


class Heartbeat:
    """Progress of one rank, written to `folder/heartbeat-RANK.json` by a thread.

    Args:
        folder: shared by the ranks of this machine.
        hang_after: seconds without a beat that count as a hang; they count from the first beat of any rank on.
        supervised: the launcher watches and decides. False: this thread does, and ends the process with HangError's
            exit code after leaving its evidence in `folder`.
    """

    def __init__(self, folder: Path, rank: int, hang_after: float, *, supervised: bool = True) -> None:
        self.folder, self.rank, self.hang_after, self.supervised = Path(folder), rank, hang_after, supervised
        self.world = process_environment().world
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"flight-{rank}.json").unlink(missing_ok=True)  # of an earlier run in the same folder
        enable_flight_recorder(os.environ)
        self._state: tuple[int, str, float | None] = (-1, "start", None)
        self._created = time.monotonic()
        self._paused_until = 0.0
        self._beats = 0
        self._lock = threading.Lock()
        self._written: tuple[int, float] | None = None
        self._answered = False
        self._interval = min(1.0, max(0.05, hang_after / 10))
        self._stop = threading.Event()
        self._stack = (self.folder / f"stack-{rank}.txt").open("w", encoding="utf-8")
        if STACK_SIGNAL is not None:
            faulthandler.register(STACK_SIGNAL, file=self._stack, all_threads=True, chain=False)
        self._write()
        self._thread = threading.Thread(target=self._run, name="trainwright-heartbeat", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str = "step") -> None:
        """The loop made progress: it is at `step` and enters `phase` ("forward", "save", ...). Costs under 1 us."""
        first = self._state[2] is None
        self._state = (step, phase, time.monotonic())
        self._beats += 1
        if first:  # a rank that stops within its first second must not look like one that is still starting
            self._write()

    @contextlib.contextmanager
    def paused(self, phase: str, *, at_most: float = 6 * 3600.0) -> Iterator[None]:
        """No rank counts as hanging meanwhile, for `at_most` seconds: for long work that has no beats (an export)."""
        step = self._state[0]
        self._paused_until = time.monotonic() + at_most
        self.beat(step, phase)
        self._write()  # the others wait for us from now on: they must not be blamed a second before the thread writes
        try:
            yield
        finally:
            self._paused_until = 0.0
            self.beat(step, phase)

    def stop(self) -> None:
        """Training ended: take the file away, so that what comes after it is not watched."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        if STACK_SIGNAL is not None:
            # Not unregistered: the default action of the signal, should it be on its way, would kill this process.
            with contextlib.suppress(ValueError):  # only the main thread may; elsewhere the handler stays, harmless
                signal.signal(STACK_SIGNAL, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            (self.folder / f"heartbeat-{self.rank}.json").unlink()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                if (self._beats, self._paused_until) != self._written:
                    self._write()
                if not self._answered and (self.folder / "dump").exists():
                    self._answered = True
                    self._dump_flight()
                if not self.supervised and self._hangs():
                    self._end()
            except OSError as error:  # a full disk: training goes on unwatched, and the launcher sees an old file
                _warn(f"warning: rank {self.rank}: heartbeat not written: {error}")
                self._interval = min(60.0, self._interval * 2)

    def _write(self) -> None:
        with self._lock:  # of the loop's thread and ours: they share the name of the unfinished file
            self._write_now()

    def _write_now(self) -> None:
        self._written = (self._beats, self._paused_until)
        step, phase, moment = self._state
        record = {
            "rank": self.rank,
            "world": self.world,
            "pid": os.getpid(),
            "main_thread": threading.main_thread().ident,
            "step": step,
            "phase": phase,
            "created": self._created,
            "beat": moment,
            "paused_until": self._paused_until,
        }
        _write_whole(self.folder / f"heartbeat-{self.rank}.json", json.dumps(record).encode())

    def _dump_flight(self) -> None:
        _write_whole(self.folder / f"flight-{self.rank}.json", json.dumps(flight_record()).encode())

    def _hangs(self) -> bool:
        moment, now = self._state[2], time.monotonic()
        if moment is None or now - moment < self.hang_after:
            return False
        from trainwright.launch.watch import read_heartbeats, stalled

        return stalled(read_heartbeats(self.folder), self.hang_after, now)

    def _end(self) -> None:
        """Leave the evidence, let one rank of this machine say what it means, and end this process."""
        from trainwright.launch.hang import analyse
        from trainwright.launch.watch import rank_reports

        self._dump_flight()
        faulthandler.dump_traceback(file=self._stack, all_threads=True)
        self._stack.flush()
        time.sleep(EVIDENCE_SECONDS)  # ranks that wait for a hanging one stop beating when it does: all write now
        reports = rank_reports(self.folder)
        speaker = min((report.rank for report in reports if report.flight is not None), default=self.rank)
        lines = [f"error: rank {self.rank} ends: no progress for {self.hang_after:g} s; evidence in {self.folder}"]
        if speaker == self.rank:
            finding = analyse(reports, self.hang_after)
            lines = [f"error: {finding.message}", *finding.details, *lines]
        _warn("\n".join(lines))
        if speaker != self.rank:
            time.sleep(2 * EVIDENCE_SECONDS)  # the first rank to end ends the job: the one that explains it
        os._exit(HangError.exit_code)


def flight_record() -> dict[str, Any]:
    """torch's record of recent collectives and the members of every group; {} where torch or the recorder is absent.

    Safe while the main thread hangs: it takes only the recorder's own lock.
    """
    torch = sys.modules.get("torch")
    native = sys.modules.get("torch._C._distributed_c10d")
    if torch is None or native is None or not torch.distributed.is_initialized():
        return {}
    found: dict[str, Any] = {"entries": []}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(native, name, None)
        if dump is None:
            continue
        try:
            found["entries"] += json.loads(dump()).get("entries", [])
        except (RuntimeError, ValueError) as error:
            found[f"{name}_error"] = str(error)
    world = torch.distributed.distributed_c10d._world
    found["groups"] = {
        world.pg_names.get(group, "?"): sorted(int(rank) for rank in ranks)
        for group, ranks in list(world.pg_group_ranks.items())
    }
    return found


def _warn(text: str) -> None:
    # In one piece: ranks may share a terminal.
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def heartbeat_from_environment(*, hang_after: float = 600.0, folder: Path | None = None) -> Heartbeat | None:
    """The heartbeat of this rank, or None in a world of one process that nobody supervises.

    Args:
        hang_after: seconds; our launcher's own setting stands before it.
        folder: where evidence goes when another launcher started the ranks; a temporary folder by default.

    Call it before torch.distributed is initialised, so that the flight recorder sees every collective.
    """
    place = process_environment()
    given = os.environ.get(FOLDER_VARIABLE)
    if given and place.launcher == "trainwright":
        return Heartbeat(Path(given), place.rank, float(os.environ.get(HANG_VARIABLE, hang_after)))
    if place.world == 1:
        return None
    if folder is None:
        job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or ""
        user = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"trainwright-hang-{user}-{job}-{place.master_port}"
    return Heartbeat(folder, place.rank, hang_after, supervised=False)
