"""Events are emitted low and rendered high: any room emits a record, the monitor decides who sees it.

A record is a flat dict of JSON values with `kind` and `time` (seconds since the epoch). Emitting never raises and
never waits: a listener that fails is dropped and counted, because a dead disk or dashboard must not stop training.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Record", "emit", "failures", "listening"]

Record = dict[str, Any]
Listener = Callable[[Record], None]

_lock = threading.Lock()
_listeners: list[Listener] = []
_failures: list[str] = []


def emit(kind: str, **fields: Any) -> None:
    """Send one record to every listener, from any thread."""
    record: Record = {"kind": kind, "time": time.time(), **fields}
    with _lock:
        listeners = list(_listeners)
    for listener in listeners:
        try:
            listener(record)
        except Exception as error:  # a listener's failure is its own: it is dropped, training goes on
            with _lock:
                _failures.append(f"{listener!r}: {error!r}")
                if listener in _listeners:
                    _listeners.remove(listener)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Deliver every record emitted in this process to `listener` while the context is open."""
    with _lock:
        _listeners.append(listener)
    try:
        yield
    finally:
        with _lock:
            if listener in _listeners:
                _listeners.remove(listener)


def failures() -> list[str]:
    """What listeners failed with since the process started, oldest first."""
    with _lock:
        return list(_failures)
