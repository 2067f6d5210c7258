"""Retention never takes the last good checkpoint nor one in use; litter goes only when its owner is dead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoint_states import make_state
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.events import Record
from trainwright.base.faults import FAULTS_VARIABLE
from trainwright.checkpoint import Attempt, Checkpointer, list_checkpoints, save_checkpoint
from trainwright.checkpoint.retention import collect_litter, set_aside_after, steps_to_delete

step_sets = st.sets(st.integers(0, 40), max_size=12)


def steps(root: Path) -> list[int]:
    return [info.step for info in list_checkpoints(root)]


@given(step_sets, step_sets, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 10)), step_sets)
def test_what_may_go(good: set[int], damaged: set[int], keep: int, keep_every: int | None, protected: set[int]) -> None:
    damaged -= good
    gone = set(steps_to_delete(good, damaged, keep=keep, keep_every=keep_every, protected=protected))
    stays = good - gone
    assert gone <= good | damaged
    assert not gone & protected
    assert len(stays) >= min(keep, len(good))
    if good:
        assert max(good) in stays
    assert sorted(good)[-keep:] == sorted(good - (gone & set(sorted(good)[:-keep])))[-keep:]
    if keep_every:
        assert not {step for step in good & gone if step % keep_every == 0}
    # nothing damaged goes before `keep` newer ones are good
    assert all(len([g for g in good if g > step]) >= keep for step in gone)
    # and what is neither newest, nor chosen, nor protected, does go
    for step in good - gone:
        newer = len([g for g in good if g > step])
        assert newer < keep or step in protected or (keep_every and step % keep_every == 0)


def test_in_a_run(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2, keep_every=100, asynchronous=True) as checkpointer:
        for step in range(20, 241, 20):
            if step == 60:
                checkpointer.protect(40)  # the best so far
            checkpointer.save(step, make_state(step))
        checkpointer.wait()
        assert steps(tmp_path) == [40, 100, 200, 220, 240]
        checkpointer.unprotect(40)
        checkpointer.save(260, make_state(1), required=True)
        assert steps(tmp_path) == [100, 200, 240, 260]


def test_a_damaged_newest_one_does_not_count_as_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(1), required=True)
        save_checkpoint(tmp_path, 9, make_state(9))
        (tmp_path / "step-9" / "manifest.json").unlink()
        checkpointer.save(2, make_state(2), required=True)
        assert steps(tmp_path) == [2, 9]
        checkpointer.save(10, make_state(10), required=True)
        assert steps(tmp_path) == [10]


def test_the_one_that_was_loaded_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, make_state(step))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.load(tmp_path / "step-2")
        for step in (4, 5):
            checkpointer.save(step, make_state(step), required=True)
    assert steps(tmp_path) == [2, 5]


def test_going_back_on_purpose_sets_newer_ones_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, make_state(step))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        moved = checkpointer.rewind(10)
        assert [path.name.split(".superseded-")[0] for path in moved] == ["step-30", "step-20"]
        assert all((path / "manifest.json").exists() for path in moved)
        checkpointer.save(12, make_state(12), required=True)
        assert checkpointer.latest() == tmp_path / "step-12"
    assert set_aside_after(tmp_path, 12) == []


def test_without_going_back_the_new_one_still_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, make_state(step))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(12, make_state(12), required=True)
    assert steps(tmp_path) == [12, 20, 30]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_old_one_that_cannot_be_deleted_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record], asynchronous: bool
) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_retention:raise@step=2")
    with Checkpointer(tmp_path, keep=1, asynchronous=asynchronous) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), required=True)
        assert steps(tmp_path) == [1, 2]
        checkpointer.save(3, make_state(3), required=True)
        assert steps(tmp_path) == [3]
    (warning,) = [record for record in records if record["kind"] == "warning"]
    assert warning["code"] == "checkpoint.retention"


def test_litter_of_the_living_stays_and_of_the_dead_goes(tmp_path: Path, records: list[Record]) -> None:
    save_checkpoint(tmp_path, 1, make_state(1))
    dead = tmp_path / f"step-2.tmp-{'a' * 32}"
    dead.mkdir()
    (dead / "data-00000-000.bin").write_bytes(b"half")
    dead.with_name(dead.name + ".owner").touch()
    lonely = tmp_path / f"step-5.tmp-{'b' * 32}.owner"
    lonely.touch()
    trash = tmp_path / f".trash-step-0-{'c' * 32}"
    trash.mkdir()
    fresh = tmp_path / f"step-6.tmp-{'d' * 32}"  # its owner file was removed by hand a moment ago
    fresh.mkdir()
    old = tmp_path / f"step-7.tmp-{'e' * 32}"
    old.mkdir()
    os.utime(old, (1, 1))
    own = [tmp_path / name for name in ("notes.txt", "step-3.tmp-mine", "step-8.bak")]
    for path in own:
        path.mkdir()
    with Attempt.open(tmp_path, 3, 0) as alive:
        removed = collect_litter(tmp_path)
        assert alive.folder.exists()
        assert sorted(removed) == sorted([trash, dead, old])
        assert not lonely.exists()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"step-1", fresh.name, alive.folder.name, alive.folder.name + ".owner", *(p.name for p in own)}
    (warning,) = records
    assert warning["code"] == "checkpoint.litter"
    assert dead.name in warning["message"]


def test_a_checkpointer_collects_litter_when_it_starts(tmp_path: Path) -> None:
    dead = tmp_path / f"step-2.tmp-{'a' * 32}"
    dead.mkdir()
    dead.with_name(dead.name + ".owner").touch()
    Checkpointer(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
