"""A file of optimizer state: no name, its space reserved, read and written past the page cache.

The file is unlinked from the moment it is made, so that the kernel removes it however the process ends, kill -9
included. Transfers use O_DIRECT where the file system knows it: what is on the disk is then not in memory a second time
as page cache. A shared mapping shows the same bytes as tensors, for whoever saves or loads the state as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.base.text import human_bytes

__all__ = ["ALIGNMENT", "StateFile", "aligned_buffer", "round_up"]

ALIGNMENT = 4096
"""O_DIRECT transfers begin and end at multiples of this, in the file and in memory."""

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def round_up(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_buffer(size: int) -> Tensor:
    """`size` bytes (a multiple of ALIGNMENT) of page-aligned memory, uint8."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.frombuffer(mmap.mmap(-1, max(size, ALIGNMENT)), dtype=torch.uint8)[:size]
    memory = mmap.mmap(-1, max(size, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The kernel pins the pages of every direct transfer, one by one.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class StateFile:
    """`size` bytes (a multiple of ALIGNMENT), zero at first, in an unnamed file in `folder`.

    Attributes:
        size: bytes.
        direct: whether transfers go past the page cache.

    Raises:
        ConfigError: the folder cannot be written, or lies in memory (tmpfs).
        MemoryLimitError: the disk has not enough space; nothing is left behind.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        self.size = size
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise ConfigError(
                f"memory.nvme_path {str(folder)!r} cannot be used: {error.strerror}",
                hint="set it to a folder on a local disk that you may write",
            ) from error
        self._refuse_memory()
        if size > free:
            raise self._no_space(free)
        self._fd, self.direct = self._open()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, max(size, ALIGNMENT))
            else:
                os.ftruncate(self._fd, max(size, ALIGNMENT))
            self._mapping = mmap.mmap(self._fd, max(size, ALIGNMENT))
        except OSError as error:
            os.close(self._fd)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._no_space(shutil.disk_usage(self._folder).free) from error
            raise
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def tensor(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The mapped bytes from `offset` as a tensor: reading it reads the disk, writing it writes to it."""
        return self._bytes[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def read(self, offset: int, into: Tensor) -> None:
        """Fill the whole of `into` (uint8, aligned as its file range is). Waits for the disk, not for Python's lock."""
        self._transfer(os.preadv, offset, into)

    def write(self, offset: int, source: Tensor) -> None:
        """Write the whole of `source`; like `read`."""
        self._transfer(os.pwritev, offset, source)
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, offset, source.numel(), os.POSIX_FADV_DONTNEED)

    def settle(self) -> None:
        """Bring what was written through tensors to the disk, and give the pages that tensors have touched back."""
        self._mapping.flush()
        if hasattr(self._mapping, "madvise"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give the file up; tensors that map it stay valid, and with the last of them its space is free."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _transfer(self, call: object, offset: int, buffer: Tensor) -> None:
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        done = 0
        while done < len(view):
            count = call(self._fd, [view[done:]], offset + done)  # type: ignore[operator]
            if count <= 0:
                raise OSError(errno.EIO, f"optimizer state in {self._folder} ends at byte {offset + done}")
            done += count

    def _open(self) -> tuple[int, bool]:
        for direct in (getattr(os, "O_DIRECT", 0), 0):
            try:
                return self._open_unnamed(direct), bool(direct)
            except OSError as error:
                # EINVAL: the file system has no direct transfers. Without them it works too.
                if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise ConfigError(
                        f"no file can be made in memory.nvme_path {str(self._folder)!r}: {error.strerror}",
                        hint="set it to a folder on a local disk that you may write",
                    ) from error
        raise AssertionError("the loop returns or raises")

    def _open_unnamed(self, flags: int) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(self._folder, os.O_TMPFILE | os.O_RDWR | flags, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
        descriptor, name = tempfile.mkstemp(prefix="trainwright-state-", dir=self._folder)
        try:
            return os.open(name, os.O_RDWR | flags)
        finally:
            os.close(descriptor)
            os.unlink(name)

    def _refuse_memory(self) -> None:
        kind = _file_system(self._folder)
        if kind in MEMORY_FILE_SYSTEMS:
            raise ConfigError(
                f"memory.nvme_path {str(self._folder)!r} is on {kind}, which is memory itself",
                hint="set it to a folder on a disk",
            )

    def _no_space(self, free: int) -> MemoryLimitError:
        return MemoryLimitError(
            f"the optimizer state of this rank takes {human_bytes(self.size)} on disk, and {str(self._folder)!r} has"
            f" {human_bytes(free)} free",
            hint="free some space, or set memory.nvme_path to another disk or memory.optimizer_state=host",
        )


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, "" where the system does not tell."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    place = str(folder.resolve())
    for line in lines:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), name
    return kind
