"""TensorBoard: the curves that are written are read back; a resume hides what it replaces."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import MissingDependencyError
from trainwright.base.events import emit
from trainwright.monitor import Monitor, TensorBoardSink


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps_and_evaluations_become_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Monitor([TensorBoardSink(tmp_path)]) as monitor:
        for step in range(1, 4):
            emit("step", step=step, loss=1.0 / step, lr=0.1, mfu=None, skipped=False)
        emit("eval", step=3, loss=0.5, perplexity=1.6, baselines={"unigram": 2.0}, metrics={"f1": 0.75})
        emit("report", split="test", step=3, loss=0.5, metrics={"f1": 0.5})
        emit("sample", step=3, text="从前")
    assert monitor.failures == {}
    read = curves(tmp_path)
    assert read["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert read["eval/loss"] == [(3, 0.5)]
    assert read["eval/baseline_unigram"] == [(3, 2.0)]
    assert read["eval/f1"] == [(3, 0.75)]
    assert read["final_test/f1"] == [(3, 0.5)]
    assert "speed/mfu" not in read


def test_a_resume_replaces_later_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Monitor([TensorBoardSink(tmp_path)]):
        for step in range(1, 7):
            emit("step", step=step, loss=1.0)
    # Event files are ordered by the second of their making; the resumed run is at least a second later.
    for file in tmp_path.iterdir():
        parts = file.name.split(".")
        parts[3] = str(int(parts[3]) - 10)
        file.rename(tmp_path / ".".join(parts))
    with Monitor([TensorBoardSink(tmp_path, resume_step=4)]):
        for step in range(5, 8):
            emit("step", step=step, loss=2.0)
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0)]


def test_a_file_in_place_of_the_folder_switches_the_sink_off(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with Monitor([TensorBoardSink(tmp_path / "file")]) as monitor:
        emit("step", step=1, loss=1.0)
    assert "tensorboard" in monitor.failures


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"trainwright\[tensorboard\]"):
        TensorBoardSink(tmp_path)
