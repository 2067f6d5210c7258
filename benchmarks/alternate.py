"""Run contenders in turns, A B A B, in one process: each trains in its own thread, and only one may run at a time."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Contender", "alternate"]


class _Over(Exception):
    """Raised inside a contender to end it after its last turn."""


@dataclass
class Contender:
    """One side of a comparison.

    Args:
        name: shown in the table.
        train: trains for ever, calling its argument after every optimizer step.
    """

    name: str
    train: Callable[[Callable[[], None]], None]
    step_seconds: list[list[float]] = field(default_factory=list)
    _turn: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)
    _left: int = 0
    _over: bool = False
    _last: float = 0.0
    _error: BaseException | None = None

    def seconds(self) -> float:
        """Median seconds of a step over all turns; the first step of each turn warms the caches and is left out."""
        return statistics.median(s for turn in self.step_seconds for s in turn[1:])

    def spread(self) -> tuple[float, float]:
        """Fastest and slowest turn, by their median step."""
        medians = [statistics.median(turn[1:]) for turn in self.step_seconds]
        return min(medians), max(medians)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a setting of the calling thread
        self._turn.wait()
        self._last = time.perf_counter()
        try:
            self.train(self._step_done)
        except _Over:
            pass
        except BaseException as error:
            self._error = error
        self._done.set()

    def _step_done(self) -> None:
        now = time.perf_counter()
        self.step_seconds[-1].append(now - self._last)
        self._left -= 1
        if self._left == 0:
            self._turn.clear()
            self._done.set()
            self._turn.wait()
            if self._over:
                raise _Over
        self._last = time.perf_counter()

    def _take_turn(self, steps: int) -> None:
        self._left = steps
        self.step_seconds.append([])
        self._done.clear()
        self._turn.set()
        self._done.wait()
        if self._error is not None:
            raise self._error


def alternate(contenders: Sequence[Contender], *, turns: int, steps: int, warmup: int, threads: int) -> None:
    """Give each contender `warmup` steps (compiling included), then `turns` rounds of `steps` steps each, in order."""
    workers = [threading.Thread(target=c._run, args=(threads,), daemon=True) for c in contenders]
    for worker, contender in zip(workers, contenders, strict=True):
        worker.start()
        contender._take_turn(warmup)
        contender.step_seconds.clear()
        print(f"warmed up: {contender.name}", flush=True)
    for turn in range(turns):
        for contender in contenders:
            contender._take_turn(steps)
            print(
                f"turn {turn + 1}: {contender.name} {statistics.median(contender.step_seconds[-1][1:]):.3f} s/step",
                flush=True,
            )
    for worker, contender in zip(workers, contenders, strict=True):
        contender._over = True
        contender._turn.set()
        worker.join(timeout=60)
