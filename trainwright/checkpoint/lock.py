"""One process per run folder: a lock that the system releases when its holder dies, with the holder's name on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from trainwright.base.errors import CheckpointError, RunInUseError

__all__ = ["LOCK_NAME", "RunLock", "owner_file", "try_lock"]

LOCK_NAME = "run.lock"
_MAX_RECORD = 4096
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def owner_file(folder: Path) -> Path:
    """The file whose lock says that the process which writes `folder` is alive."""
    return folder.with_name(folder.name + ".owner")


def try_lock(descriptor: int) -> bool | None:
    """Take the exclusive lock of an open file without waiting: True taken, False held elsewhere, None not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


class RunLock:
    """Exclusive use of a run folder, from construction to `release`, the end of the process, or kill -9.

    The lock is flock on `run.lock`; the file's content (process, host, since when) only serves the message. Where the
    file system has no flock, the content decides: a holder on this machine counts as dead when its process is gone, one
    on another machine counts as alive.

    Raises:
        RunInUseError: another process, or this one, holds the folder; says which, where and since when.
        CheckpointError: the lock file cannot be opened.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK_NAME
        self.token = uuid.uuid4().hex
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = self._acquire()
        try:
            self._write_record(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)

    def _acquire(self) -> int:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise CheckpointError(
                    f"the run folder {self.folder} cannot be locked: {self.path.name}: {error.strerror}",
                    hint="check the permissions of the folder; the lock file must be a plain file",
                ) from error
            try:
                taken = try_lock(descriptor)
                record = _read_record(descriptor)
                if taken is None:
                    taken = not _record_is_alive(record)
                if not taken:
                    raise self._in_use(record)
                if _same_file(descriptor, self.path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the file was removed between opening and locking it: lock the new one

    def _in_use(self, record: dict[str, Any]) -> RunInUseError:
        pid, host, since = record.get("pid", "unknown"), record.get("host", "unknown"), record.get("since", "unknown")
        here = host == socket.gethostname()
        itself = " (this very process)" if here and pid == os.getpid() else ""
        stop = f"`kill {pid}`" if here else f"`kill {pid}` on {host}"
        return RunInUseError(
            f"the run folder {self.folder} is in use by process {pid}{itself} on {host} since {since}",
            hint=f"wait until it ends, stop it with {stop} (it saves and exits), or choose another run name",
        )

    def _write_record(self, descriptor: int) -> None:
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "boot": _boot_id(),
            "process_start": _process_start(os.getpid()),
            "token": self.token,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(record) + "\n").encode("utf-8"), 0)

    def check(self) -> None:
        """Fencing: called right before a commit.

        Raises:
            RunInUseError: the lock was released, or its file was removed or taken over, so this process may not write.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise RunInUseError(f"the lock of {self.folder} was released; this process may not write there any more")
        if not _same_file(descriptor, self.path) or _read_record(descriptor).get("token") != self.token:
            raise RunInUseError(
                f"the lock file {self.path} was removed or taken over while this process was running; it may not write "
                f"there any more",
                hint="another process may be using the folder; stop one of them and resume",
            )

    def release(self) -> None:
        """Give the folder back; twice is fine. The file stays, empty: removing it could take away another's lock."""
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if descriptor is not None:
            if _read_record(descriptor).get("token") == self.token:
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _forget_in_child(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_held: set[RunLock] = set()


def _close_in_child() -> None:
    # flock belongs to the open file, which a forked worker shares: without this, a worker that outlives a killed
    # trainer would keep the run folder locked.
    for lock in list(_held):
        lock._forget_in_child()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _read_record(descriptor: int) -> dict[str, Any]:
    """The holder's record; empty when it is being written, was cleared or makes no sense."""
    try:
        record = json.loads(os.pread(descriptor, _MAX_RECORD, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _record_is_alive(record: dict[str, Any]) -> bool:
    pid = record.get("pid")
    if type(pid) is not int:
        return False
    if record.get("host") != socket.gethostname():
        return True
    return record.get("boot") == _boot_id() and record.get("process_start") == _process_start(pid) is not None


def _boot_id() -> str:
    """Differs after every start of the machine, so that a process number of an earlier life is not believed."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return "unknown"


def _process_start(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine started; None when there is no such process.

    Where there is no /proc, "running" for every process that exists: numbers are reused only after a long time.
    """
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return text.rpartition(")")[2].split()[19]
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
