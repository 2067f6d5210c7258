"""The monitor: takes every record emitted in the process and hands it to the sinks on one thread of its own.

Training only appends to a bounded queue. A full queue drops step records, which come again, and keeps the others.
A sink that fails is switched off with one warning; a sink that hangs costs the others their records, training nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from trainwright.base.events import Record, listening
from trainwright.monitor.records import plain_record

__all__ = ["Monitor", "Sink"]

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""How often sinks get to flush or redraw when no record arrives."""

IMPORTANT_FACTOR = 4
"""Records other than steps may fill the queue this many times over before they are dropped too."""


class Sink(Protocol):
    """Where records go. All methods run on the monitor's thread; any of them may raise, which switches the sink off."""

    name: str

    def open(self) -> None:
        """Called once, before the first record."""

    def write(self, record: Record) -> None:
        """Take one record of plain values; it must not be changed, other sinks get the same one."""

    def tick(self) -> None:
        """Called several times a second: the place to flush or redraw."""

    def close(self) -> None:
        """Called once at the end, also after a failure."""


class Monitor:
    """While the context is open, every emitted record reaches every sink that works.

    Args:
        sinks: opened in this order; each record goes to them in this order.
        capacity: step records that may wait.
        close_deadline: seconds that leaving the context waits for the queue to empty and the sinks to close.

    Attributes:
        dropped: records that no sink saw, by kind.
        failures: what switched a sink off, by sink name.
    """

    def __init__(self, sinks: Sequence[Sink], *, capacity: int = 1024, close_deadline: float = 10.0) -> None:
        self.dropped: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self._sinks = list(sinks)
        self._capacity = capacity
        self._close_deadline = close_deadline
        self._queue: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trainwright-monitor", daemon=True)
        self._listening = listening(self._put)

    def __enter__(self) -> Monitor:
        self._thread.start()
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(kind, error, trace)
        self.close()

    def close(self) -> None:
        """Hand out what waits, close the sinks; give up after the deadline. Called by leaving the context."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._close_deadline)
        if self._thread.is_alive():
            with self._changed:
                lost = len(self._queue)
            log.warning("monitor: a sink did not finish in %.0f s; %d records are lost", self._close_deadline, lost)

    def _put(self, record: Record) -> None:
        """Runs on whatever thread emits: a few hundred nanoseconds, never more than that."""
        with self._changed:
            if len(self._queue) >= self._capacity and not self._make_room(record):
                kind = str(record["kind"])
                self.dropped[kind] = self.dropped.get(kind, 0) + 1
                return
            self._queue.append(record)
            self._changed.notify()

    def _make_room(self, record: Record) -> bool:
        return record["kind"] != "step" and len(self._queue) < IMPORTANT_FACTOR * self._capacity

    def _run(self) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, "open")
        while True:
            with self._changed:
                if not self._queue and not self._closing:
                    self._changed.wait(TICK_SECONDS)
                records, closing = list(self._queue), self._closing
                self._queue.clear()
            for record in records:
                self._hand_out(plain_record(record))
            for sink in list(self._sinks):
                self._guarded(sink, "tick")
            if closing and not records:
                break
        self._report_dropped()
        for sink in list(self._sinks):
            self._guarded(sink, "close")

    def _hand_out(self, record: Record) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, "write", record)

    def _guarded(self, sink: Sink, method: str, *arguments: Record) -> None:
        try:
            getattr(sink, method)(*arguments)
        except Exception as error:  # a sink's failure is its own: training and the other sinks go on
            self._switch_off(sink, error)

    def _switch_off(self, sink: Sink, error: Exception) -> None:
        if sink not in self._sinks:
            return
        self._sinks.remove(sink)
        self.failures[sink.name] = f"{type(error).__name__}: {error}"
        message = f"monitor: {sink.name} is switched off: {self.failures[sink.name]}"
        try:
            sink.close()
        except Exception as second:  # it failed already; what matters is that the handle was tried
            log.debug("closing the failed sink %s: %r", sink.name, second)
        if self._sinks:
            self._hand_out({"kind": "warning", "time": time.time(), "code": "monitor.sink", "message": message})
        else:
            log.warning("%s", message)

    def _report_dropped(self) -> None:
        with self._changed:
            dropped = dict(self.dropped)
        if dropped:
            counts = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
            message = f"monitor: sinks were too slow, records dropped: {counts}"
            self._hand_out({"kind": "warning", "time": time.time(), "code": "monitor.dropped", "message": message})
