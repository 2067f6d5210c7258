"""Starts the ranks of one machine, lets one of them speak, and ends all of them when one fails, hangs or is stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from trainwright.base.errors import HangError, Interrupted, TrainwrightError
from trainwright.launch.endings import Ending, describe_ending, exit_code, first_failure, is_consequence, memory_kills
from trainwright.launch.hang import HangFinding, analyse
from trainwright.launch.output import RankOutput, pump, resize_terminals
from trainwright.launch.watch import evidence_complete, rank_reports, read_heartbeats, request_evidence, stalled
from trainwright.launch.world import core_lists, rank_environment, reserve_port

__all__ = ["LaunchOptions", "launch"]

TICK = 0.05
SETTLE_SECONDS = 0.3
"""After the first failure: how long others that fail at the same time may take to be counted too."""
ECHO_SECONDS = 3.0
"""After a failure that looks like a lost connection: how long to wait for the rank that caused it."""
SHIM = Path(__file__).with_name("shim.py")


@dataclass(frozen=True)
class LaunchOptions:
    """How to launch.

    command: the program and its arguments, the same for every rank. grace: seconds that ranks get after SIGTERM or
    Ctrl-C. kill_after: seconds between SIGTERM and SIGKILL for ranks whose peer failed. hang_after: seconds without
    progress, None leaves it to the ranks' own default and does not watch. logs: a folder in which one is
    made for the output of all ranks; None takes the system's temporary folder. keep_logs: also when all ends well.
    bind_cores: each rank stays on its own cores. port: where the ranks meet; None finds a free one.
    """

    command: Sequence[str]
    processes: int
    grace: float = 60.0
    kill_after: float = 5.0
    hang_after: float | None = None
    logs: Path | None = None
    keep_logs: bool = False
    bind_cores: bool = False
    port: int | None = None


def launch(options: LaunchOptions) -> int:
    """Run the ranks to their end and return the exit code: 0, or that of the rank that failed first.

    128 + signal stands for a rank that a signal ended, HangError's code for a hang, 75 for ranks that were asked to
    stop and saved. Failures are told on standard error. No rank outlives this call, nor this process.

    Raises:
        ConfigError: the port is taken.
    """
    holder, port = reserve_port(options.port)
    with holder:
        return _Supervisor(options, _make_folder(options.logs), port).run()


def _make_folder(parent: Path | None) -> Path:
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
        parent = parent.resolve()
    return Path(tempfile.mkdtemp(prefix=time.strftime("launch-%Y%m%d-%H%M%S-"), dir=parent))


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    output: RankOutput
    ended_at: float | None = None


@dataclass
class _Supervisor:
    options: LaunchOptions
    folder: Path
    port: int
    ranks: list[_Rank] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    stopping: int | None = None
    """The signal that was passed on to the ranks."""
    failed_at: float | None = None
    ending: bool = False
    """We end the ranks ourselves: how they end from here on says nothing."""
    deadline: float | None = None
    overdue: list[int] = field(default_factory=list)
    finding: HangFinding | None = None
    looked_at: float = 0.0
    kills_before: int = 0

    def run(self) -> int:
        self.kills_before = memory_kills()
        with self._signals():
            try:
                self._start()
                while self._alive():
                    self._turn()
                return self._conclude()
            finally:
                self._leave_nothing()

    def _start(self) -> None:
        options = self.options
        cores = core_lists(options.processes) if options.bind_cores else ["-"] * options.processes
        for number in range(options.processes):
            output = RankOutput(number, self.folder / f"rank-{number}.log", speaks=number == 0)
            environment = rank_environment(
                os.environ, number, options.processes, self.port, self.folder, options.hang_after
            )
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(SHIM), str(os.getpid()), cores[number], *options.command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output.out.writing,
                    stderr=output.err.writing,
                    start_new_session=True,  # Ctrl-C in the terminal reaches us only; what the rank starts ends with it
                )
            finally:
                for channel in output.channels:
                    channel.close_writing()
            self.ranks.append(_Rank(number, process, output))

    def _alive(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.ended_at is None]

    def _turn(self) -> None:
        """One round: take output, see who ended, pass signals on, look for hangs, end what is overdue."""
        if not pump([rank.output for rank in self.ranks], TICK):
            time.sleep(TICK)
        for rank in self._alive():
            self._reap(rank)
        while self.signals:
            self._pass_on(self.signals.pop(0))
        now = time.monotonic()
        self._judge(now)
        if self.options.hang_after is not None and not self.ending and now - self.looked_at > self._look_every():
            self.looked_at = now
            self._look_for_hang(self.options.hang_after)
        if self.deadline is not None and now > self.deadline:
            self.deadline = None
            self.overdue = [rank.number for rank in self._alive()] if not self.ending else self.overdue
            self._send(signal.SIGKILL)

    def _look_every(self) -> float:
        return min(1.0, max(TICK, (self.options.hang_after or 10.0) / 10))

    def _reap(self, rank: _Rank) -> None:
        pid = rank.process.pid
        if hasattr(os, "waitid"):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            # While it is not reaped its number is nobody else's: the processes it started can be ended safely.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        elif rank.process.poll() is None:
            return
        code = rank.process.wait()
        now = rank.ended_at = time.monotonic()
        self._drain(rank.output)
        if not self.ending and rank.number not in self.overdue:
            self.endings.append(Ending(rank.number, code, now, rank.output.error_time(now), rank.output.error()))

    def _drain(self, output: RankOutput) -> None:
        """What the rank wrote last is in the pipes still."""
        for channel in output.channels:
            output.read(channel)

    def _judge(self, now: float) -> None:
        """Decide whether a rank has failed and the others have to end."""
        if self.ending or self.stopping is not None:
            return
        cause = first_failure(self.endings)
        if cause is None:
            self.ranks[0].output.release_old()
            return
        if self.failed_at is None:
            self.failed_at = now
        waited = now - self.failed_at
        if cause.code == Interrupted.exit_code:
            # A batch system told every rank to stop, and they leave one by one; a second signal would disturb them.
            if waited > self.options.grace:
                self._pass_on(signal.SIGTERM)
            return
        if is_consequence(cause) or self._erred_before(cause):
            patience = ECHO_SECONDS
        else:
            patience = 0.0 if cause.code < 0 else SETTLE_SECONDS
        if waited >= patience:
            if is_consequence(cause):
                self._blame_the_living(now)
            self._end_all(self.options.kill_after)

    def _blame_the_living(self, now: float) -> None:
        """Every rank that ended had only lost a connection: count those that wrote an error and have not left yet."""
        for rank in self._alive():
            moment = rank.output.error_time(now)
            if moment is not None:
                self.endings.append(Ending(rank.number, TrainwrightError.exit_code, now, moment, rank.output.error()))

    def _erred_before(self, cause: Ending) -> list[_Rank]:
        """Ranks that wrote an error earlier than the one that ended first: Python takes a while to leave."""
        began = cause.ended_at if cause.error_at is None else cause.error_at
        return [rank for rank in self._alive() if (rank.output.error_time(cause.ended_at) or began) < began]

    def _end_all(self, kill_after: float) -> None:
        self.ending = True
        self._send(signal.SIGTERM)
        self.deadline = time.monotonic() + kill_after

    def _pass_on(self, number: int) -> None:
        """A stop is passed on once: ranks that save take a second signal for an order to leave at once."""
        if number == getattr(signal, "SIGWINCH", None):
            resize_terminals([rank.output for rank in self.ranks])
            return
        if self.ending:
            return
        if self.stopping is None:
            self.stopping = number
            self.deadline = time.monotonic() + self.options.grace
            self._send(number)
            return
        left = max(0.0, (self.deadline or 0.0) - time.monotonic())
        self._say(f"the ranks were told to stop already; those still there in {left:.0f} s are killed")

    def _send(self, number: int) -> None:
        for rank in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, number)

    def _look_for_hang(self, hang_after: float) -> None:
        beats = read_heartbeats(self.folder)
        if not stalled(beats, hang_after, time.monotonic()):
            return
        request_evidence(self.folder)
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and not evidence_complete(self.folder):
            pump([rank.output for rank in self.ranks], TICK)
        self.finding = analyse(rank_reports(self.folder), hang_after)
        self.ranks[0].output.drop()
        self._fail(self.finding.message, list(self.finding.details))
        self._end_all(min(2.0, self.options.kill_after))

    def _conclude(self) -> int:
        """Tell what happened, the cause first, and give the exit code."""
        speaker = self.ranks[0].output
        if self.finding is not None:  # told when it was found
            return HangError.exit_code
        cause = first_failure(self.endings)
        if self.overdue:
            speaker.release()
            names = ", ".join(str(number) for number in self.overdue)
            self._fail(f"rank {names}: still there {self.options.grace:g} s after the stop signal, and killed", [])
            return exit_code(-signal.SIGKILL)
        if cause is None or cause.code == Interrupted.exit_code:
            speaker.release()
            self._tidy(keep=cause is not None)
            return 0 if cause is None else cause.code
        if self.stopping is not None and exit_code(cause.code) == exit_code(-self.stopping):
            speaker.release()
            return exit_code(cause.code)
        self._tell_failure(cause)
        return exit_code(cause.code)

    def _tell_failure(self, cause: Ending) -> None:
        speaker = self.ranks[0].output
        words = describe_ending(cause.code, oom_kills=memory_kills() - self.kills_before)
        if cause.rank == 0 and speaker.release():
            self._say(f"rank 0 of {len(self.ranks)} failed first: {words}; its error stands above")
            self._say_where()
            return
        speaker.drop()
        self._fail(
            f"rank {cause.rank} of {len(self.ranks)} failed first: {words}",
            [f"  | {line}" for line in cause.error.splitlines()],
        )

    def _fail(self, message: str, details: list[str]) -> None:
        self._say("\n".join([f"error: {message}", *details]))
        self._say_where()

    def _say_where(self) -> None:
        self._say(f"  -> what every rank wrote: {self.folder}/rank-*.log")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the ranks are not
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _tidy(self, *, keep: bool) -> None:
        for pattern in ("heartbeat-*", "stack-*", "flight-*", ".*.part", "dump"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if not keep and not self.options.keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _leave_nothing(self) -> None:
        """Also when we fail ourselves: no rank and nothing that a rank started is left."""
        for rank in self._alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.kill()
            rank.process.wait()
        for rank in self.ranks:
            rank.output.close()

    def _note(self, kind: int, number: int, frame: FrameType | None) -> None:
        self.signals.append(kind)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Collect the signals that ask for a stop; what they mean is decided in `_turn`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGWINCH"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                continue
            kind = signal.SIGTERM if name == "SIGHUP" else number
            before[number] = signal.signal(number, functools.partial(self._note, kind))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
