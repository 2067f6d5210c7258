"""Values made ahead of their use, by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """One thread that makes the next values into a bounded queue: make(first), make(first + step), ... and so on.

    Args:
        make: pure. What it raises, `take` raises in its place, and nothing is made after it.
        depth: values that wait, at most.
    """

    def __init__(self, make: Callable[[int], Made], first: int, step: int, depth: int) -> None:
        self._queue: queue.Queue[Made | _Raised] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(make, first, step, self._queue, self._stopping), name="prefetch", daemon=True
        )
        self._thread.start()

    def take(self) -> Made:
        """The next value, as soon as it is made."""
        item = self._queue.get()
        if isinstance(item, _Raised):
            raise item.error
        return item

    def stop(self) -> None:
        """End the thread; what it made is thrown away."""
        self._stopping.set()
        while True:  # a full queue holds the thread in `put`
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)


class _Raised:
    """What `make` raised: the consumer raises it; a thread's own traceback helps nobody."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _produce(
    make: Callable[[int], Made], number: int, step: int, out: queue.Queue[Made | _Raised], stopping: threading.Event
) -> None:
    """Not a method, so that the thread does not keep the Prefetcher alive."""
    item: Made | _Raised
    while not stopping.is_set():
        try:
            item = make(number)
        except BaseException as error:
            item = _Raised(error)
        while not stopping.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, _Raised):
            return
        number += step
