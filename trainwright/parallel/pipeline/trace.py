"""A schedule as it really ran: what each rank computed when, how long it waited, and a file that browsers show."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Action", "Recorder", "chrome_trace", "idle_share", "write_chrome_trace"]

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "R": "sum of gradients",
}


class Action(NamedTuple):
    """One thing that one rank did.

    Attributes:
        kind: F forward, B whole backward, I backward of inputs, W backward of weights, R the sum of gradients over
            data-parallel ranks after the last backward pass.
        part, micro_batch: of what; micro_batch is -1 for R.
        start, end: seconds since the epoch.
        rank: place in the pipeline.
    """

    kind: str
    part: int
    micro_batch: int
    start: float
    end: float
    rank: int


def idle_share(actions: Iterable[Action]) -> dict[int, float]:
    """By rank, the share of the whole (first start to last end over all ranks) in which it computed nothing.

    Actions of one step, of as many ranks as are to be compared; those of one rank do not overlap.
    """
    known = list(actions)
    if not known:
        return {}
    whole = max(action.end for action in known) - min(action.start for action in known)
    busy: dict[int, float] = {}
    for action in known:
        busy[action.rank] = busy.get(action.rank, 0.0) + action.end - action.start
    return {rank: 1.0 - busy[rank] / whole if whole > 0 else 0.0 for rank in sorted(busy)}


def chrome_trace(actions: Sequence[Action]) -> dict[str, object]:
    """The actions in the Trace Event Format, one row for each rank: chrome://tracing and Perfetto show it."""
    begin = min((action.start for action in actions), default=0.0)
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in sorted({action.rank for action in actions})
    ]
    for action in sorted(actions, key=lambda action: action.start):
        label = action.kind if action.micro_batch < 0 else f"{action.kind}{action.micro_batch}"
        events.append(
            {
                "name": label,
                "cat": KINDS[action.kind],
                "ph": "X",
                "ts": (action.start - begin) * 1e6,
                "dur": (action.end - action.start) * 1e6,
                "pid": action.rank,
                "tid": action.part,
                "args": {"part": action.part, "micro_batch": action.micro_batch},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(actions: Sequence[Action], path: Path) -> None:
    """Write `chrome_trace` of these actions to a file."""
    path.write_text(json.dumps(chrome_trace(actions)), encoding="utf-8")


class Recorder:
    """Notes when this rank does what. On a GPU it notes events in the stream, which are read once the step is over."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self._cuda = device.type == "cuda"
        self._noted: list[tuple[str, int, int, object, object]] = []
        self._zero: object = None
        self._epoch = 0.0
        self._clock = 0.0

    def begin(self) -> None:
        """Forget what was noted; a step begins."""
        self._noted = []
        self._epoch, self._clock = time.time(), time.perf_counter()
        if self._cuda:
            self._zero = self.now()

    def now(self) -> object:
        """This moment, on the host's clock or in the GPU's stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, kind: str, part: int, micro_batch: int, start: object) -> None:
        """What began at `start` ends now."""
        self._noted.append((kind, part, micro_batch, start, self.now()))

    def actions(self) -> list[Action]:
        """What was noted since `begin`; waits for the GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        return [
            Action(kind, part, micro_batch, self._seconds(start), self._seconds(end), self.rank)
            for kind, part, micro_batch, start, end in self._noted
        ]

    def _seconds(self, moment: object) -> float:
        if isinstance(moment, float):
            return self._epoch + moment - self._clock
        assert isinstance(moment, torch.cuda.Event)
        assert isinstance(self._zero, torch.cuda.Event)
        return self._epoch + self._zero.elapsed_time(moment) / 1e3
