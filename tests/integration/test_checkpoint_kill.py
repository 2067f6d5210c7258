"""Real SIGKILL at every named point of a save and at random moments: what is found afterwards is whole, old or new."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.base.errors import CheckpointError, RunInUseError
from trainwright.base.faults import FAULTS_VARIABLE, registered_points
from trainwright.checkpoint import Checkpointer, RunLock, list_checkpoints, load_latest, verify
from trainwright.testing import fork_server

# Children are forked from a server that has torch loaded and has never computed: no child imports it again.
CONTEXT = fork_server()

POINTS = [
    "save.before_data",
    "save.after_data_file",
    "save.before_report",
    "save.before_manifest",
    "save.before_commit",
    "save.after_commit",
    "save.before_retention",
]


def state_of(step: int, scale: int = 1) -> dict[str, Any]:
    """Content that depends on the step in every tensor: one of another step anywhere is noticed."""
    tensors = {f"layer.{i}": torch.full((257 * scale, 129), float(step * 100 + i)) for i in range(8)}
    return {"model": tensors, "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}}, "data": {"index": step}}


def is_of(state: dict[str, Any], step: int, scale: int = 1) -> bool:
    wanted = state_of(step, scale)
    return state["data"] == {"index": step} and all(
        torch.equal(wanted["model"][name], tensor) for name, tensor in state["model"].items()
    )


def save_forever(folder: str, faults: str, asynchronous: bool, first: int, pipe: Connection) -> None:
    """The child: save step after step, and tell the parent which are certainly on the disk."""
    torch.set_num_threads(1)
    if faults:
        os.environ[FAULTS_VARIABLE] = faults
    lock = RunLock(folder)
    pipe.send(-1)
    checkpointer = Checkpointer(Path(folder) / "checkpoints", keep=2, asynchronous=asynchronous, lock=lock)
    for step in range(first, 100_000):
        checkpointer.save(step, state_of(step, 4), {"step": step})
        if step % 3 == 0:
            checkpointer.wait()
            pipe.send(step)


class Child:
    def __init__(self, folder: Path, *, faults: str = "", asynchronous: bool = True, first: int = 1) -> None:
        self.pipe, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (str(folder), faults, asynchronous, first, theirs)
        self.process = CONTEXT.Process(target=save_forever, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> int:
        """SIGKILL; returns the last step that the child knew to be on the disk, or -1."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        return self.join()

    def join(self) -> int:
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL
        last = -1
        try:
            while self.pipe.poll():
                last = self.pipe.recv()
        except EOFError:
            pass
        return last


def check_after_kill(folder: Path, at_least: int) -> int:
    """Resume as a run would: the newest checkpoint is whole, has the content of its step, and no litter stays."""
    root = folder / "checkpoints"
    with RunLock(folder), Checkpointer(root, keep=2) as checkpointer:
        loaded = checkpointer.load_latest()
    if loaded is None:
        assert at_least == -1
        return 0
    assert loaded.step >= at_least
    assert loaded.meta == {"step": loaded.step}
    assert is_of(loaded.state, loaded.step, 4)
    for info in list_checkpoints(root):
        assert info.complete, info
        assert verify(info.path).ok
    assert all(path.name.removeprefix("step-").isdigit() for path in root.iterdir())
    return loaded.step


def test_the_points_below_are_all_there_are() -> None:
    assert sorted(POINTS) == sorted(point for point in registered_points() if point.startswith("save."))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_kill_9_at_every_point_of_a_save(tmp_path: Path, point: str, asynchronous: bool) -> None:
    child = Child(tmp_path, faults=f"{point}:kill@step=5", asynchronous=asynchronous)
    known = child.join()
    assert known == 3
    expected = 5 if point in ("save.after_commit", "save.before_retention") else 4
    assert check_after_kill(tmp_path, known) == expected


def test_kill_9_at_random_moments_of_continuous_saving(tmp_path: Path) -> None:
    moments = random.Random(20)
    step = 0
    for attempt in range(20):
        child = Child(tmp_path, asynchronous=attempt % 2 == 0, first=step + 1)
        assert child.pipe.poll(60)  # it begins now
        time.sleep(moments.uniform(0, 0.4))
        known = child.kill()
        after = check_after_kill(tmp_path, max(known, step if step else -1))
        assert after >= step  # nothing that was there is ever lost
        step = after
    assert step > 20  # saves really happened


def test_kill_9_while_loading_changes_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints", asynchronous=False) as checkpointer:
        checkpointer.save(1, state_of(1, 4), {"step": 1}, required=True)
    process = CONTEXT.Process(target=_load_and_die, args=(str(tmp_path / "checkpoints"),), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert check_after_kill(tmp_path, 1) == 1


def _load_and_die(folder: str) -> None:
    os.environ[FAULTS_VARIABLE] = "load.before_read:kill"
    load_latest(folder)


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    child = Child(tmp_path)
    assert child.pipe.poll(60)
    assert child.pipe.recv() == -1
    with pytest.raises(RunInUseError, match=f"process {child.process.pid}"):
        RunLock(tmp_path)
    assert child.pipe.poll(60)
    # A reader beside a living writer sees whole checkpoints only, and takes nothing away from it.
    for _ in range(20):
        loaded = _load_while_others_delete(tmp_path / "checkpoints")
        assert is_of(loaded.state, loaded.step, 4)
    known = child.kill()
    assert check_after_kill(tmp_path, known) >= known


def _load_while_others_delete(root: Path) -> Any:
    for _ in range(50):
        try:
            loaded = load_latest(root)
        except CheckpointError:  # retention took it between listing and opening
            continue
        if loaded is not None:
            return loaded
    raise AssertionError("no checkpoint could be loaded in 50 tries")


def _save_under_file_size_limit(folder: str, pipe: Connection) -> None:
    checkpointer = Checkpointer(folder, asynchronous=False)
    checkpointer.save(1, state_of(1, 4), {"step": 1}, required=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a quota: writing fails in the middle of a file
    try:
        checkpointer.save(2, state_of(2, 4), {"step": 2}, required=True)
    except CheckpointError as error:
        pipe.send(str(error))


def test_a_quota_that_is_reached_in_the_middle_of_a_file(tmp_path: Path) -> None:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_save_under_file_size_limit, args=(str(tmp_path / "checkpoints"), theirs))
    process.start()
    process.join(60)
    assert os.strerror(errno.EFBIG) in ours.recv()
    assert check_after_kill(tmp_path, 1) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"this user may not mount a small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("preflight", [True, False])
def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, preflight: bool) -> None:
    from trainwright.checkpoint import storage

    root = small_disk / "checkpoints"
    monkeypatch.setattr(storage, "FREE_SPACE_MARGIN", 0)
    with Checkpointer(root, asynchronous=False) as checkpointer:
        checkpointer.save(1, state_of(1, 4), {"step": 1}, required=True)
        if not preflight:  # another process fills the disk after the look at it
            monkeypatch.setattr(storage, "check_free_space", lambda folder, needed: None)
        expected = "not enough free space" if preflight else os.strerror(errno.ENOSPC)
        with pytest.raises(CheckpointError, match=expected):
            checkpointer.save(2, state_of(2, 4), {"step": 2}, required=True)
    assert check_after_kill(small_disk, 1) == 1
