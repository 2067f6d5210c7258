"""One process per run folder; the system gives the lock back when its holder dies, and who lost it cannot commit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_states import make_state

from trainwright.base.errors import CheckpointError, RunInUseError
from trainwright.checkpoint import Checkpointer, RunLock, list_checkpoints

HOLDER = """
import sys, time
from trainwright.checkpoint import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_gets_it_after_kill_9(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "run 运行")
    try:
        with pytest.raises(RunInUseError) as refused:
            RunLock(tmp_path / "run 运行")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    text = str(refused.value)
    assert f"process {holder.pid}" in text
    assert socket.gethostname() in text
    assert "since 20" in text
    assert f"kill {holder.pid}" in text
    RunLock(tmp_path / "run 运行").release()


def test_the_same_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunInUseError, match="this very process"):
        RunLock(tmp_path)
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()
    lock.release()
    with pytest.raises(RunInUseError, match="released"):
        lock.check()


def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom trainwright.checkpoint import RunLock\n"
        "lock = RunLock(sys.argv[1])\npid = os.fork()\n"
        "if pid == 0:\n    print(os.getpid(), flush=True); time.sleep(30); os._exit(0)\n"
        "time.sleep(30)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())  # from the child itself: it has run what follows a fork
    parent.kill()
    parent.wait()
    try:
        os.kill(child, 0)  # it lives
        RunLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_writer_that_lost_its_lock_cannot_commit(tmp_path: Path, asynchronous: bool) -> None:
    lock = RunLock(tmp_path)
    with Checkpointer(tmp_path / "checkpoints", asynchronous=asynchronous, lock=lock) as checkpointer:
        checkpointer.save(1, make_state(1), required=True)
        (tmp_path / "run.lock").unlink()  # somebody "repairs" the folder and starts a second process
        with RunLock(tmp_path), pytest.raises(RunInUseError, match="removed or taken over"):
            checkpointer.save(2, make_state(2), required=True)
        checkpointer.save(3, make_state(3)) if asynchronous else None
        with pytest.raises(RunInUseError, match="removed or taken over"):  # not a failure to go on after
            checkpointer.save(4, make_state(4))
    assert [info.step for info in list_checkpoints(tmp_path / "checkpoints")] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def record(**changes: object) -> str:
    lock_free = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-01-01 00:00:00", "token": "x"}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return json.dumps({**lock_free, "boot": boot, "process_start": start, **changes})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the process table of Linux")
@pytest.mark.parametrize(
    ("content", "alive"),
    [
        ({}, True),
        ({"host": "another-machine"}, True),
        ({"pid": 2**22 + 7}, False),
        ({"boot": "an earlier start of this machine"}, False),
        ({"process_start": "12"}, False),  # the number was given to another process since
    ],
    ids=["alive", "other host", "dead", "rebooted", "number reused"],
)
def test_without_flock_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, object], alive: bool
) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / "run.lock").write_text(record(**content), encoding="utf-8")
    if alive:
        with pytest.raises(RunInUseError, match="2026-01-01"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).release()
        assert (tmp_path / "run.lock").read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": "x"}', b"{" * 9000])
def test_a_lock_file_that_makes_no_sense_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    with RunLock(tmp_path) as lock:
        lock.check()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text", encoding="utf-8")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="cannot be locked"):
        RunLock(tmp_path)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "text"
