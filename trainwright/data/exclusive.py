"""One process builds a folder at a time; others wait, then find it built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainwright.base.errors import DataError
from trainwright.base.events import emit

__all__ = ["building"]


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, a hidden file beside it. The lock ends with its process, however that ends.

    Raises DataError when the place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint="choose another folder (data.cache, or the folder of `data build`)",
        ) from error
    with lock:
        try:
            import fcntl
        except ImportError:  # Windows: no flock; two builds at once of one folder are the user's to avoid there
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            emit("warning", message=f"another process is building {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
