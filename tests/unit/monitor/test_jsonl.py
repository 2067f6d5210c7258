"""metrics.jsonl: strict JSON whatever comes, no duplicates after a resume, torn lines repaired, full disks survived."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.events import emit
from trainwright.monitor import JsonlSink, Monitor, read_history, rewind_history
from trainwright.monitor.records import from_json_line, plain_record, to_json_line


def strict(line: bytes) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


HOSTILE: dict[str, Any] = {
    "kind": "step",
    "nan": math.nan,
    "up": math.inf,
    "down": -math.inf,
    "tensor": torch.tensor(float("nan")),
    "array": np.float32(0.5),
    "whole": np.int64(7),
    "matrix": torch.zeros(2, 2),
    "path": Path("a/b"),
    "text": '训练 "quoted"\nnew line \u2028',
    "surrogate": "caf\udce9",
    "nested": {"loss": math.nan, 3: [math.inf, (1, 2)]},
    "nothing": None,
    "truth": True,
}


def test_hostile_values_are_one_strict_line() -> None:
    line = to_json_line(HOSTILE)
    assert line.count(b"\n") == 1
    read = strict(line)
    assert (read["nan"], read["up"], read["down"], read["tensor"]) == ("NaN", "Infinity", "-Infinity", "NaN")
    assert (read["array"], read["whole"], read["truth"], read["nothing"]) == (0.5, 7, True, None)
    assert read["text"] == HOSTILE["text"]
    assert "训练" in line.decode("utf-8"), "Chinese stays readable in the file"
    assert read["nested"] == {"loss": "NaN", "3": ["Infinity", [1, 2]]}
    assert read["path"] == "a/b"


def test_non_finite_numbers_come_back_as_numbers() -> None:
    record = from_json_line(to_json_line({"kind": "step", "loss": math.nan, "lr": 0.1, "grad_norm": math.inf}))
    assert math.isnan(record["loss"])
    assert (record["lr"], record["grad_norm"]) == (0.1, math.inf)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(categories=["L", "N"])), json_values, max_size=4))
def test_any_values_make_a_strict_line(fields: dict[str, Any]) -> None:
    strict(to_json_line({"kind": "x", **fields}))


def test_plain_record_leaves_the_original_alone() -> None:
    record = {"kind": "step", "loss": torch.tensor(1.0)}
    assert plain_record(record)["loss"] == 1.0
    assert isinstance(record["loss"], torch.Tensor)


def run(path: Path, steps: range, *, resume_step: int | None = None, evaluate: bool = False) -> None:
    with Monitor([JsonlSink(path, resume_step=resume_step)]):
        emit("run.start", step=steps.start)
        for step in steps:
            emit("step", step=step + 1, loss=1.0 / (step + 1))
            if evaluate and (step + 1) % 5 == 0:
                emit("eval", step=step + 1, loss=0.5)


def test_history_is_appended_and_read_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    run(path, range(10), evaluate=True)
    assert [r["step"] for r in read_history(path, "step")] == list(range(1, 11))
    assert [r["step"] for r in read_history(path, "eval")] == [5, 10]
    assert len(list(read_history(path))) == 13
    for line in path.read_bytes().splitlines():
        strict(line)


def test_resume_leaves_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, range(20), evaluate=True)  # killed after step 20; the newest checkpoint is of step 12
    run(path, range(12, 20), resume_step=12, evaluate=True)
    assert [r["step"] for r in read_history(path, "step")] == list(range(1, 21))
    assert [r["step"] for r in read_history(path, "eval")] == [5, 10, 15, 20]
    assert [r["step"] for r in read_history(path, "run.start")] == [0, 12], "what happened is not rewritten"


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [r["step"] for r in read_history(path, "step")] == [1, 2], "readable before the repair too"
    run(path, range(2, 4))
    assert [r["step"] for r in read_history(path, "step")] == [1, 2, 3, 4]
    for line in path.read_bytes().splitlines():
        strict(line)


def test_rewinding_counts_and_touches_nothing_needlessly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rewind_history(path, 5) == 0
    run(path, range(8))
    before = path.stat().st_ino
    assert rewind_history(path, 8) == 0
    assert path.stat().st_ino == before
    path.write_bytes(path.read_bytes() + b'["not", "a record"]\n{"step": 3, "kin')
    assert rewind_history(path, 6) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "no temporary file stays"


def test_lines_reach_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, flush_records=3, flush_seconds=1000)
    sink.open()
    for step in range(2):
        sink.write({"kind": "step", "step": step})
    assert path.read_bytes() == b""
    sink.write({"kind": "step", "step": 2})
    assert len(list(read_history(path))) == 3
    sink.write({"kind": "step", "step": 3})
    sink.write({"kind": "eval", "step": 3})
    assert len(list(read_history(path))) == 5, "an evaluation is written at once"
    sink.close()


def test_quiet_runs_flush_by_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, flush_records=1000, flush_seconds=0.0)
    sink.open()
    sink.write({"kind": "step", "step": 0})
    sink.tick()
    assert len(list(read_history(path))) == 1
    sink.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_switches_the_sink_off_and_nothing_else(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", flush_records=1)
    sink.open()
    assert sink._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sink._file.fileno())
    os.close(full)
    sink.open = lambda: None  # type: ignore[method-assign]  # it is open, on a full disk
    other = JsonlSink(tmp_path / "other.jsonl")
    with Monitor([sink, other]) as monitor:
        for step in range(5):
            emit("step", step=step)
    assert "No space left on device" in monitor.failures["metrics.jsonl"]
    history = list(read_history(other.path))
    assert [r["step"] for r in history if r["kind"] == "step"] == list(range(5))
    assert len([r for r in history if r["kind"] == "warning"]) == 1


def test_a_folder_that_cannot_be_made_switches_the_sink_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with Monitor([JsonlSink(tmp_path / "file" / "metrics.jsonl")]) as monitor:
        emit("step", step=1)
    assert "metrics.jsonl" in monitor.failures
