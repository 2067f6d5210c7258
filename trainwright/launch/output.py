"""What ranks write: rank 0 speaks to the terminal, everybody is kept in a file, and error texts are remembered.

Rank 0 gets terminals of its own where the launcher has one, so that live displays and colours stay. When rank 0 begins
an error, its text is held back for a moment: it may only be the echo of another rank's failure, which is shown first.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from trainwright.launch.endings import ERROR_START, last_error

__all__ = ["RankOutput", "open_channel", "pump", "resize_terminals"]

HOLD_SECONDS = 4.0
"""An error text of rank 0 that is older and was followed by no failure was only a message: it is shown."""

TAIL_BYTES = 64 * 1024
ERROR_BEGINS = re.compile(ERROR_START.pattern.encode(), re.MULTILINE)


class Channel:
    """One stream of a rank (its standard output or error): the descriptor we read, and the one the rank writes."""

    def __init__(self, target: int | None) -> None:
        """target: the descriptor that a speaking rank's bytes go to; None for a rank that does not speak."""
        self.target = target
        self.terminal = target is not None and os.isatty(target)
        if self.terminal:
            assert target is not None
            self.reading, self.writing = _terminal_like(target)
        else:
            self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.open = True

    def close_writing(self) -> None:
        """To be called once the rank has it: only the rank's end keeps the stream open then."""
        os.close(self.writing)


def open_channel(target: int | None) -> Channel:
    """A pipe, or a pseudo terminal of the same size when `target` is a terminal."""
    return Channel(target)


def _terminal_like(target: int) -> tuple[int, int]:
    import pty
    import tty

    reading, writing = pty.openpty()
    tty.setraw(writing)  # the bytes pass through as they are; the real terminal does what terminals do
    _copy_size(target, reading)
    return reading, writing


def _copy_size(source: int, destination: int) -> None:
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        fcntl.ioctl(destination, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8))


def resize_terminals(outputs: list[RankOutput]) -> None:
    """Pass a change of the window's size on (SIGWINCH)."""
    for output in outputs:
        for channel in output.channels:
            if channel.terminal and channel.open and channel.target is not None:
                _copy_size(channel.target, channel.reading)


class RankOutput:
    """The output of one rank.

    speaks: its bytes go on to the launcher's own standard output and error. path: the file that keeps all of it.
    """

    def __init__(self, rank: int, path: Path, *, speaks: bool) -> None:
        self.rank = rank
        self.path = path
        self.out = open_channel(1 if speaks else None)
        self.err = open_channel(2 if speaks else None)
        self.channels = (self.out, self.err)
        self._file = path.open("wb", buffering=0)
        self._tails: dict[Channel, bytearray] = {self.out: bytearray(), self.err: bytearray()}
        self._error_times: deque[float] = deque(maxlen=64)
        self._held: bytearray | None = None
        self._held_since = 0.0
        self.dropped = False

    def read(self, channel: Channel) -> None:
        """Take what the rank wrote since the last time."""
        while channel.open:
            try:
                data = os.read(channel.reading, 65536)
            except BlockingIOError:
                return
            except OSError:  # a pseudo terminal whose other end is closed answers with EIO
                data = b""
            if not data:
                os.close(channel.reading)
                channel.open = False
                return
            self._take(channel, data)

    def _take(self, channel: Channel, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the training that it tells of
            self._file.write(data)
        tail = self._tails[channel]
        tail += data
        del tail[:-TAIL_BYTES]
        begins = ERROR_BEGINS.search(data) if channel is self.err else None
        if begins:
            self._error_times.append(time.monotonic())
        if channel.target is None:
            return
        if channel is self.err and (self._held is not None or begins):
            if self._held is None:
                assert begins is not None
                self._held, self._held_since = bytearray(), time.monotonic()
                self._show(channel, data[: begins.start()])
                data = data[begins.start() :]
            self._held += data
        else:
            self._show(channel, data)

    def _show(self, channel: Channel, data: bytes) -> None:
        view = memoryview(data)
        while view and channel.target is not None:
            try:
                view = view[os.write(channel.target, view) :]
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # nobody reads us any more; the file still has it, and training goes on
                channel.target = None

    def release_old(self) -> None:
        """Show a held error text that turned out not to be the rank's end."""
        if self._held is not None and time.monotonic() - self._held_since > HOLD_SECONDS:
            self.release()

    def release(self) -> bool:
        """Show what is held back. True when there was something."""
        held, self._held = self._held, None
        if not held:
            return False
        self._show(self.err, bytes(held))
        return True

    def drop(self) -> None:
        """Do not show what is held back: it tells of another rank's failure. The file keeps it."""
        self.dropped = self.dropped or bool(self._held)
        self._held = None

    def error(self) -> str:
        """The last error text: from standard error, or the end of standard output when that is empty."""
        for channel in (self.err, self.out):
            text = self._tails[channel].decode("utf-8", errors="replace")
            if text.strip():
                return last_error(text)
        return ""

    def error_time(self, before: float) -> float | None:
        """When the error began that ended the rank at `before` (monotonic seconds); None when it wrote none."""
        recent = [moment for moment in self._error_times if moment > before - 10.0]
        return min(recent) if recent else None

    def close(self) -> None:
        for channel in self.channels:
            if channel.open:
                os.close(channel.reading)
                channel.open = False
        self._file.close()


def pump(outputs: list[RankOutput], seconds: float) -> bool:
    """Wait at most `seconds` for ranks to write and take it. False when every stream has ended."""
    with _selector(outputs) as selector:
        if not selector.get_map():
            return False
        for key, _ in selector.select(seconds):
            output, channel = key.data
            output.read(channel)
    return True


@contextlib.contextmanager
def _selector(outputs: list[RankOutput]) -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as selector:
        for output in outputs:
            for channel in output.channels:
                if channel.open:
                    selector.register(channel.reading, selectors.EVENT_READ, (output, channel))
        yield selector
