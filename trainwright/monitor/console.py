"""Progress on the terminal: one live line where there is a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Literal

from trainwright.base.events import Record
from trainwright.monitor.wording import LossAverage, describe, fit, step_parts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

__all__ = ["ConsoleMode", "ConsoleSink", "choose_mode"]

ConsoleMode = Literal["auto", "rich", "plain", "quiet"]

QUIET_KINDS = frozenset({"warning", "checkpoint.failed"})
"""What `quiet` still shows: things that somebody must know."""


def choose_mode(mode: ConsoleMode, stream: IO[str]) -> Literal["rich", "plain", "quiet"]:
    """What `auto` means: a live line on a terminal; plain lines in a pipe, in CI, on a dumb one or with NO_COLOR."""
    if mode != "auto":
        return mode
    told_plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return "rich" if stream.isatty() and not told_plain else "plain"


class ConsoleSink:
    """Shows steps, evaluations, checkpoints, samples and warnings.

    Args:
        mode: `rich` redraws one line at the bottom; `plain` writes whole lines and never a carriage return; `quiet`
            shows warnings only; `auto` chooses (`choose_mode`).
        stream: where to; None is standard output as it is when the monitor starts.
        plain_seconds: at most one plain step line in this time; the last step is always shown.
        memory_total: bytes that the device has, for "1.2/23 GiB".
    """

    name = "console"

    def __init__(
        self,
        mode: ConsoleMode = "auto",
        *,
        stream: IO[str] | None = None,
        plain_seconds: float = 2.0,
        memory_total: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self._stream = stream
        self._plain_seconds = plain_seconds
        self._memory_total = memory_total
        self._clock = clock
        self._average = LossAverage()
        self._shown_at = -float("inf")
        self._saved_at: float | None = None
        self._last_step: Record | None = None
        self._last_average: float | None = None
        self._live: Live | None = None
        self._console: Console | None = None

    def open(self) -> None:
        self._stream = self._stream or sys.stdout
        self.mode = choose_mode(self.mode, self._stream)
        if self.mode == "rich":
            from rich.console import Console
            from rich.live import Live

            self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def write(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "step":
            self._step(record)
            return
        if kind == "checkpoint.saved":
            self._saved_at = self._clock()
        if kind == "run.end":
            self._keep_live_line()
        if self.mode != "quiet" or kind in QUIET_KINDS:
            for line in describe(record):
                self._line(line)

    def tick(self) -> None:
        self._redraw()

    def close(self) -> None:
        if self._live is not None:
            self._keep_live_line()
            live, self._live = self._live, None
            live.stop()

    def _step(self, record: Record) -> None:
        loss = record.get("loss")
        if isinstance(loss, (int, float)):
            self._last_average = self._average.add(float(loss))
        self._last_step = record
        is_last = record.get("step") == record.get("total_steps")
        if self.mode == "plain" and (is_last or self._clock() - self._shown_at >= self._plain_seconds):
            self._shown_at = self._clock()
            self._line(self._progress(None))

    def _progress(self, width: int | None) -> str:
        assert self._last_step is not None, "no step to show"
        saved_ago = None if self._saved_at is None else self._clock() - self._saved_at
        parts = step_parts(
            self._last_step, average=self._last_average, memory_total=self._memory_total, saved_ago=saved_ago
        )
        return fit(parts, width)

    def _redraw(self) -> None:
        if self._live is None or self._console is None or self._last_step is None:
            return
        from rich.text import Text

        text = Text(self._progress(self._console.width - 1), no_wrap=True, overflow="ellipsis", style="bold")
        self._live.update(text, refresh=True)

    def _keep_live_line(self) -> None:
        """Print the live line for good: it vanishes with the live display."""
        if self._live is not None and self._last_step is not None:
            self._line(self._progress(None))
            self._last_step = None

    def _line(self, text: str) -> None:
        assert self._stream is not None, "written before open"
        if self._live is not None and self._console is not None:
            self._console.print(text, markup=False)
            return
        try:
            print(text, file=self._stream, flush=True)
        except UnicodeEncodeError:  # a terminal that cannot show a character must not lose the line
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)
