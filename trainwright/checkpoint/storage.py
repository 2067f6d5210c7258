"""The file operations of a checkpoint: durable, exclusive, and never led outside their folder.

Everything that changes the disk during a save goes through a function here, so that the tests can record the order of
operations and replay every prefix of it. A checkpoint is opened by a folder descriptor, and files inside it by name
relative to that descriptor without following links: what was checked is what is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

from trainwright.base.errors import CheckpointError

__all__ = [
    "BLOCK_BYTES",
    "SLICE_BYTES",
    "check_free_space",
    "close",
    "create_file",
    "exchange",
    "folder_descriptor",
    "hash_bytes",
    "make_folder",
    "new_hash",
    "open_regular",
    "read_exactly",
    "read_small",
    "remove_file",
    "remove_tree",
    "rename",
    "sync",
    "sync_folder",
    "write_all",
]

SLICE_BYTES = 4 << 20
"""Bytes per write, read or hash call: long enough that the interpreter lock is free nearly all the time, short enough
that a save which is told to stop does so in milliseconds."""

BLOCK_BYTES = 4096
"""Direct writes begin and end at blocks of the disk: 512 or 4096 bytes."""

FREE_SPACE_MARGIN = 64 << 20


# --- hashes ---------------------------------------------------------------------------------------------------------


def new_hash() -> xxhash.xxh3_128:
    """xxh3 with 128 bits: it finds accidents (about 10 GB/s a core); it is no signature against an attacker."""
    return xxhash.xxh3_128()


def hash_bytes(data: bytes | memoryview) -> str:
    """The xxh3_128 of `data`, 32 lowercase hexadecimal digits, as `xxh128sum` prints it."""
    return xxhash.xxh3_128_hexdigest(data)


# --- changing the disk ----------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder that must not exist yet."""
    os.mkdir(path)


def create_file(path: Path, *, direct: bool = False) -> int:
    """Open a new file for writing; FileExistsError when there is one, because nothing is ever written in place.

    Args:
        direct: go past the page cache, where the system can (O_DIRECT). Copying 400 MB into the cache took 0.1 to
            1.0 s of processor time on a virtual machine, which is time that training does not get; past it, 0.03 s.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    if direct:
        _set_direct(descriptor, True)
    return descriptor


def _set_direct(descriptor: int, on: bool) -> bool:
    """Turn O_DIRECT on or off for an open file; False where the file system does not know it."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the current position: the system may take fewer bytes than offered.

    What is not a whole number of blocks, in size, position or memory, goes through the page cache.
    """
    view = memoryview(data).cast("B")
    while len(view):
        if len(view) % BLOCK_BYTES:
            _set_direct(descriptor, False)
        try:
            written = os.write(descriptor, view[:SLICE_BYTES])
        except OSError as error:
            is_direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
            if error.errno != errno.EINVAL or not is_direct:
                raise
            _set_direct(descriptor, False)
            continue
        view = view[written:]


def sync(descriptor: int) -> None:
    """Return when the content of the file is on the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Close a descriptor of `create_file`. Some network file systems report a failed write only here."""
    os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk: a renamed file can otherwise vanish with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename; atomic inside one file system."""
    os.rename(source, target)


def remove_file(path: Path) -> None:
    """Remove one file; one that is gone already is fine."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it (links inside are removed, not followed); one that is gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one atomic step (Linux renameat2, RENAME_EXCHANGE). False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange_flag = -100, 2
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse a save that cannot fit, before a byte of it is written.

    Args:
        needed: bytes that the save will write. 64 MiB beside them must stay free, so that logs can go on.

    Raises:
        CheckpointError: the file system of `folder` has less.
    """
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < needed + FREE_SPACE_MARGIN:
        raise CheckpointError(
            f"not enough free space for a checkpoint in {folder}: it needs {needed / 2**20:.1f} MiB and "
            f"{FREE_SPACE_MARGIN >> 20} MiB of margin, {free / 2**20:.1f} MiB are free",
            hint="free some space, keep fewer checkpoints, or put the run folder on a larger disk; "
            "earlier checkpoints are untouched",
        )


# --- reading --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder_descriptor(path: Path) -> Iterator[int]:
    """Open a folder that is not a symbolic link.

    Raises:
        CheckpointError: it is missing, is a link, or is no folder.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if path.is_symlink():
            reason, hint = "it is a symbolic link, which is never followed", "pass the folder itself"
        else:
            reason, hint = os.strerror(error.errno or 0), "`trainwright checkpoint list` shows what is there"
        raise CheckpointError(f"checkpoint {path} cannot be opened: {reason}", hint=hint) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(folder: int, name: str) -> tuple[int, int]:
    """Open a plain file of an open folder for reading; returns (descriptor, size in bytes).

    Raises:
        CheckpointError: it is missing, or is a link, a pipe or anything but a plain file.
    """
    # O_NONBLOCK: opening a named pipe that was put in a file's place must not hang.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise CheckpointError(f"{name}: the file is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise CheckpointError(f"{name}: it is a symbolic link, which is never followed") from error
        raise CheckpointError(f"{name}: cannot be opened: {os.strerror(error.errno or 0)}") from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{name}: it is not a plain file")
    return descriptor, facts.st_size


def read_exactly(descriptor: int, view: memoryview, position: int, name: str) -> None:
    """Fill `view` with the bytes of a file from `position` on.

    Raises:
        CheckpointError: the file ends before, or the disk reports an error.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + (256 << 20)]], position + done)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read: {os.strerror(error.errno or 0)}") from error
        if count == 0:
            raise CheckpointError(f"{name}: the file ends at byte {position + done} while it is read")
        done += count


def read_small(folder: int, name: str, limit: int) -> bytes:
    """The whole of a file that must not be larger than `limit` bytes.

    Raises:
        CheckpointError: it is larger (nothing of it is read then), missing, or no plain file.
    """
    descriptor, size = open_regular(folder, name)
    try:
        if size > limit:
            raise CheckpointError(f"{name}: {size} bytes, more than the limit of {limit}")
        data = bytearray(size)
        read_exactly(descriptor, memoryview(data), 0, name)
        return bytes(data)
    finally:
        os.close(descriptor)
