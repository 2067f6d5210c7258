"""Run contenders in turns, A B A B: each lives in a process of its own, with its own allocator, threads and settings as
its users have them, and only one computes at a time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

__all__ = ["STEPS_FOR_EVER", "Contender", "alternate", "take_turns"]

STEPS_FOR_EVER = 100_000
"""How long a side is told to train: it is stopped when there are no more turns."""


@dataclass
class Contender:
    """One side of a comparison, as the parent sees it.

    Args:
        name: shown in the table; the script is started again with `--side NAME` to be this side.
        arguments: further arguments of that process.
        python: the interpreter that runs it, where the side lives in an environment of its own.
        values: what it reported of its steps; `warmup_values` of those before the first turn.
    """

    name: str
    arguments: Sequence[str] = ()
    python: str = sys.executable
    seconds_of_turns: list[list[float]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    warmup_values: list[Any] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None

    def seconds(self) -> float:
        """Median seconds of a step over all turns; the first step of each turn warms the caches and is left out."""
        return statistics.median(s for turn in self.seconds_of_turns for s in turn[1:])

    def spread(self) -> tuple[float, float]:
        """Fastest and slowest turn, by their median step."""
        medians = [statistics.median(turn[1:]) for turn in self.seconds_of_turns]
        return min(medians), max(medians)

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self.python, sys.argv[0], "--side", self.name, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, steps: int) -> None:
        """Let the side take `steps` steps; raises RuntimeError when it died (its errors are on stderr)."""
        assert self._process is not None, "not started"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early with exit code {self._process.wait()}")
        report = json.loads(line)
        self.seconds_of_turns.append(report["seconds"])
        self.values.extend(report["values"])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def alternate(contenders: Sequence[Contender], *, turns: int, steps: int, warmup: int) -> None:
    """Give each contender `warmup` steps (compiling included), then `turns` rounds of `steps` steps each, in order."""
    try:
        for contender in contenders:
            contender.start()
            contender.turn(warmup)
            contender.seconds_of_turns.clear()
            contender.warmup_values, contender.values = contender.values, []
            print(f"warmed up: {contender.name}", flush=True)
        for number in range(turns):
            for contender in contenders:
                contender.turn(steps)
                pace = statistics.median(contender.seconds_of_turns[-1][1:])
                print(f"turn {number + 1}: {contender.name} {pace:.3f} s/step", flush=True)
    finally:
        for contender in contenders:
            contender.stop()


class _Over(Exception):
    """Raised inside a side when the parent has no more turns for it."""


def take_turns(train: Callable[[Callable[..., None]], None]) -> None:
    """Be a side: `train` trains for ever and calls its argument after every step, with what JSON can hold to report of
    it, if anything."""
    reports: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the side prints must not get between the reports
    seconds: list[float] = []
    values: list[Any] = []
    wanted = 0
    last = 0.0

    def wait_for_turn() -> None:
        nonlocal wanted, last
        line = sys.stdin.readline()
        if not line:
            raise _Over
        wanted = int(line)
        last = time.perf_counter()

    def step_done(value: Any = None) -> None:
        nonlocal last
        seconds.append(time.perf_counter() - last)
        if value is not None:
            values.append(value)
        if len(seconds) == wanted:
            print(json.dumps({"seconds": seconds, "values": values}), file=reports, flush=True)
            seconds.clear()
            values.clear()
            wait_for_turn()
        last = time.perf_counter()

    try:
        wait_for_turn()
        train(step_done)
    except _Over:
        return
