"""Saving during a run: asynchronous equals synchronous, failures do not stop training until there are too many."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import make_state, same

from trainwright.base.errors import CheckpointError
from trainwright.base.events import Record
from trainwright.base.faults import FAULTS_VARIABLE
from trainwright.checkpoint import Checkpointer, list_checkpoints, load_checkpoint, storage, verify
from trainwright.checkpoint import checkpointer as checkpointer_module


def steps(root: Path) -> list[int]:
    return [info.step for info in list_checkpoints(root)]


def kinds(records: list[Record]) -> list[str]:
    return [record["kind"] for record in records]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_save_and_load_latest(tmp_path: Path, records: list[Record], asynchronous: bool) -> None:
    with Checkpointer(tmp_path / "checkpoints", keep=2, asynchronous=asynchronous) as checkpointer:
        assert checkpointer.load_latest() is None
        checkpointer.prepare(make_state(0))
        for step in (10, 20, 30):
            assert checkpointer.save(step, make_state(step), {"tokens": step})
        checkpointer.wait()
        assert checkpointer.latest() == tmp_path / "checkpoints" / "step-30"
        loaded = checkpointer.load_latest(like=make_state(1))
        assert loaded is not None
        assert (loaded.step, loaded.meta) == (30, {"tokens": 30})
        assert same(loaded.state, make_state(30))
    assert steps(tmp_path / "checkpoints") == [20, 30]
    assert kinds(records) == ["checkpoint.saved"] * 3
    saved = records[-1]
    assert saved["step"] == 30
    assert saved["path"] == str(tmp_path / "checkpoints" / "step-30")
    assert saved["bytes"] == (tmp_path / "checkpoints" / "step-30" / "data-00000-000.bin").stat().st_size
    assert saved["seconds"] > 0
    assert saved["stall_seconds"] > 0


def test_asynchronous_files_are_byte_for_byte_the_synchronous_ones(tmp_path: Path) -> None:
    state = make_state(3)
    state["model"]["transposed"] = torch.randn(40, 30).t()
    for name, asynchronous in (("sync", False), ("async", True)):
        with Checkpointer(tmp_path / name, asynchronous=asynchronous) as checkpointer:
            checkpointer.save(1, state, {"a": 1}, required=True)
    files = [(tmp_path / name / "step-1" / "data-00000-000.bin").read_bytes() for name in ("sync", "async")]
    assert files[0] == files[1]


def test_training_may_change_everything_while_the_save_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_data:sleep=0.3")
    state = make_state(5)
    with Checkpointer(tmp_path, asynchronous=True) as checkpointer:
        checkpointer.save(5, state)
        assert checkpointer.is_busy
        state["model"]["embed.weight"].zero_()
        state["optimizer"]["param_groups"][0]["lr"] = 0.0
        state["optimizer"]["state"][0]["step"].add_(1)
        state["data"]["index"] = -1
        checkpointer.wait()
    assert same(load_checkpoint(tmp_path / "step-5")[0], make_state(5))


def test_buffers_are_reused_and_follow_a_changed_state(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, asynchronous=True, keep=None) as checkpointer:
        for step in range(6):
            state: dict[str, Any] = {"x": {"a": torch.full((step // 2 + 1, 3), float(step)), "b": torch.tensor(step)}}
            before = dict(checkpointer._snapshot._buffers)
            checkpointer.save(step, state, required=True)
            if step % 2:
                assert before["x/a"] is checkpointer._snapshot._buffers["x/a"]
            assert same(load_checkpoint(tmp_path / f"step-{step}")[0], state)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_commit:sleep=0.2")
    with Checkpointer(tmp_path, asynchronous=True) as checkpointer:
        started = time.monotonic()
        checkpointer.save(1, make_state(1))
        assert time.monotonic() - started < 0.15
        checkpointer.save(2, make_state(2))
        assert time.monotonic() - started > 0.2
    assert steps(tmp_path) == [1, 2]
    assert same(load_checkpoint(tmp_path / "step-1")[0], make_state(1))


def test_or_is_skipped_by_policy_unless_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record]
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_commit:sleep=0.2")
    with Checkpointer(tmp_path, asynchronous=True, when_busy="skip") as checkpointer:
        assert checkpointer.save(1, make_state(1)) is True
        assert checkpointer.save(2, make_state(2)) is False
        assert checkpointer.save(3, make_state(3), required=True) is True
        assert steps(tmp_path) == [1, 3]
    assert kinds(records) == ["warning", "checkpoint.saved", "checkpoint.saved"]
    assert records[0]["code"] == "checkpoint.skipped"
    assert "step 2" in records[0]["message"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "point",
    ["save.before_data", "save.after_data_file", "save.before_manifest", "save.before_commit"],
)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_a_failed_save_leaves_nothing_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record], asynchronous: bool, point: str, action: str
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, f"{point}:{action}@step=2")
    with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.save(2, make_state(2))
        with pytest.raises(CheckpointError) as failed:
            checkpointer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
        checkpointer.save(3, make_state(3), required=True)
    assert kinds(records) == ["checkpoint.saved", "checkpoint.failed", "checkpoint.saved"]
    failure = records[1]
    assert (failure["step"], failure["failures_in_a_row"]) == (2, 1)
    expected = "No space left on device" if action == "enospc" else f"fault injected at {point}"
    assert expected in failure["reason"]
    assert expected in str(failed.value)
    assert steps(tmp_path) == [1, 3]
    assert all(verify(tmp_path / f"step-{step}").ok for step in (1, 3))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_too_many_failures_in_a_row_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record], asynchronous: bool
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_data:enospc")
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous, max_failures=2)
    checkpointer.save(1, make_state(1))
    if asynchronous:  # the failure of a save in flight is counted when the next one comes
        checkpointer.save(2, make_state(2))
    with pytest.raises(CheckpointError, match=r"2 checkpoints in a row could not be saved.*No space"):
        checkpointer.save(3, make_state(3))
    assert kinds(records) == ["checkpoint.failed"] * 2
    monkeypatch.delenv(FAULTS_VARIABLE)
    assert checkpointer.save(9, make_state(9), required=True)  # a last save is always tried
    assert checkpointer.save(10, make_state(10))  # and success resets the count
    assert checkpointer.close()
    assert steps(tmp_path) == [9, 10]


def test_a_required_save_raises_its_own_failure_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_manifest:enospc")
    for asynchronous in (False, True):
        expected = pytest.raises(CheckpointError, match=r"step 4 could not be written.*No space left")
        with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer, expected:
            checkpointer.save(4, make_state(4), required=True)


def test_a_state_that_cannot_be_saved_is_an_error_at_once(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, asynchronous=True) as checkpointer:
        with pytest.raises(CheckpointError, match="state/model/hook"):
            checkpointer.save(1, {"model": {"hook": print}})
        with pytest.raises(CheckpointError, match="step must be"):
            checkpointer.save(-1, make_state(1), required=True)
        with pytest.raises(CheckpointError, match="meta/t"):
            checkpointer.save(1, {}, {"t": torch.ones(1)})


def test_too_little_free_space_is_found_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[Path] = []
    monkeypatch.setattr(storage, "FREE_SPACE_MARGIN", 1 << 62)
    monkeypatch.setattr(storage, "create_file", created.append)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=r"free space.*MiB are"):
        checkpointer.save(1, make_state(1), required=True)
    assert created == []


def test_closing_waits_for_the_save_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_commit:sleep=0.2")
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, make_state(1))
    assert checkpointer.close() is True
    assert steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match="closed"):
        checkpointer.save(2, make_state(2))


def test_closing_stops_at_the_deadline_and_says_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record]
) -> None:
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, make_state(1), required=True)
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_data:sleep=0.4")  # then the first slice sees that it shall stop
    checkpointer.save(2, make_state(2))
    assert checkpointer.close(deadline_seconds=0.05) is False
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert records[-1]["kind"] == "checkpoint.failed"
    assert records[-1]["step"] == 2
    assert "stopped at exit" in records[-1]["reason"]


def test_the_same_step_again_replaces_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for exchange in (storage.exchange, lambda one, other: False):  # with and without renameat2
        monkeypatch.setattr(storage, "exchange", exchange)
        with Checkpointer(tmp_path) as checkpointer:
            for seed in (1, 2):
                checkpointer.save(7, make_state(seed), required=True)
                assert same(load_checkpoint(tmp_path / "step-7")[0], make_state(seed))
                assert [path.name for path in tmp_path.iterdir()] == ["step-7"]


def test_the_writer_thread_does_not_lower_the_priority_of_training(tmp_path: Path) -> None:
    import os

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    seen: list[int] = []
    real = checkpointer_module.write_together

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return real(*args, **kwargs)

    checkpointer_module.write_together = spy
    try:
        with Checkpointer(tmp_path, asynchronous=True) as checkpointer:
            checkpointer.save(1, make_state(1), required=True)
    finally:
        checkpointer_module.write_together = real
    assert seen == [max(before, checkpointer_module.WRITER_NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="when_busy='never'"):
        Checkpointer(tmp_path, when_busy="never")  # type: ignore[arg-type]
