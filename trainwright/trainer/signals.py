"""SIGTERM and Ctrl-C ask for a stop: the loop saves and leaves after the step. A second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from trainwright.base.events import emit
from trainwright.launch import launched

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO_SECONDS = 5.0
"""In a launched world, the same stop may arrive twice within this time."""


class StopRequest:
    """Context manager: `requested` names the signal once one has arrived.

    The first signal only sets the flag. The second restores the default handlers and is raised again, so that a run
    that cannot reach a step boundary can still be ended. Outside the main thread, where Python allows no handlers,
    `request()` is the way to stop.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._asked_at = 0.0
        self._previous: dict[int, object] = {}

    def request(self, reason: str) -> None:
        """Ask for a stop from code (a callback, a notebook, another thread)."""
        self.requested = reason

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested is None:
            self.requested = name
            self._asked_at = time.monotonic()
            emit("warning", message=f"{name}: saving at the end of this step, then leaving; once more to leave at once")
            return
        if launched() and time.monotonic() - self._asked_at < ECHO_SECONDS:
            return  # a scheduler signals every process, and the launcher passes the same signal on
        self._restore()
        os.kill(os.getpid(), number)
