"""What people see: the progress line, evaluations with baselines, narrow terminals, pipes, Chinese text."""

from __future__ import annotations

import io
import os
import pty
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.events import Record, emit
from trainwright.base.text import display_width
from trainwright.monitor import ConsoleSink, Monitor
from trainwright.monitor.console import choose_mode
from trainwright.monitor.wording import LossAverage, ago, describe, fit, step_parts

STEP: Record = {
    "kind": "step",
    "step": 1200,
    "total_steps": 20000,
    "tokens": 4_915_200,
    "loss": 3.2139,
    "lr": 3e-4,
    "grad_norm": 0.91,
    "tokens_per_second": 41234.0,
    "mfu": 0.381,
    "data_wait": 0.004,
    "memory_bytes": int(1.2 * 2**30),
    "eta_seconds": 18720.0,
    "skipped": False,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(records: list[Record], **options: Any) -> list[str]:
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream=stream, **options)
    sink.open()
    for record in records:
        sink.write(record)
        sink.tick()
    sink.close()
    return stream.getvalue().splitlines()


def test_the_progress_line() -> None:
    parts = step_parts(STEP, average=3.23, memory_total=23 * 2**30, saved_ago=490.0)
    assert fit(parts, None) == (
        "step 1200/20000 6.0% | loss 3.214 (ema 3.230) | 41.2k tok/s | 38.1% MFU | mem 1.2/23 GiB | data wait 0.4% | "
        "ckpt 8 min ago | ETA 5h12m"
    )


def test_the_last_step_has_no_time_left_to_speak_of() -> None:
    nearly = {"kind": "step", "step": 7, "total_steps": 8, "loss": 1.0, "eta_seconds": 0.2}
    assert fit(step_parts(nearly, average=None, memory_total=None, saved_ago=None), None).endswith("| ETA 1s")
    last = {**nearly, "step": 8, "eta_seconds": 0.0}
    assert "ETA" not in fit(step_parts(last, average=None, memory_total=None, saved_ago=None), None)


def test_a_step_with_nothing_measured_yet() -> None:
    record = {"kind": "step", "step": 1, "total_steps": 8, "loss": float("nan"), "mfu": None, "skipped": True}
    assert fit(step_parts(record, average=None, memory_total=None, saved_ago=None), None) == (
        "step 1/8 12.5% | loss nan SKIPPED"
    )


@pytest.mark.parametrize("width", range(10, 160, 7))
def test_narrow_terminals_lose_the_least_telling_parts(width: int) -> None:
    parts = step_parts(STEP, average=3.23, memory_total=23 * 2**30, saved_ago=490.0)
    line = fit(parts, width)
    assert line.startswith("step 1200/20000 6.0%")
    assert display_width(line) <= max(width, display_width(parts[0]))
    if width > 60:
        assert "loss" in line
        assert "ETA" in line


def test_loss_average_is_right_from_the_first_loss_and_passes_over_nan() -> None:
    average = LossAverage(0.5)
    assert average.add(4.0) == pytest.approx(4.0)
    assert average.add(float("nan")) == pytest.approx(4.0)
    assert average.add(1.0) == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)
    assert LossAverage().add(float("inf")) is None


def test_evaluations_stand_beside_their_baselines() -> None:
    record = {
        "kind": "eval",
        "step": 200,
        "loss": 3.4567,
        "perplexity": 31.71,
        "baselines": {"unigram": 6.1, "bigram": 4.25},
    }
    assert describe(record) == [
        "eval at step 200 | validation loss 3.4567 | perplexity 31.71 | unigram baseline 6.1000, bigram baseline 4.2500"
    ]


def test_the_metric_that_counts_comes_first_and_long_lists_are_cut() -> None:
    record: Record = {
        "kind": "eval",
        "step": 20,
        "loss": 0.41,
        "perplexity": 1.5,
        "metric": "f1",
        "metrics": {"accuracy": 0.9, "f1": 0.8123, "bleu": 31.456},
    }
    assert describe(record) == ["eval at step 20 | f1 0.8123 | validation loss 0.4100 | accuracy 0.9000 | bleu 31.46"]
    many = {**record, "metrics": {f"of class {n}": n / 10 for n in range(9)}}
    assert describe(many)[0].endswith("| of class 5 0.5000 | +3 more")
    assert describe({**record, "metrics": {}})[0].endswith("validation loss 0.4100 | perplexity 1.5")
    final = {"kind": "report", "split": "test", "step": 20, "loss": 0.5, "metric": "f1", "metrics": {"f1": 0.75}}
    assert describe(final) == ["test at the end | f1 0.7500 | loss 0.5000"]


def test_checkpoints_warnings_and_samples() -> None:
    saved = {"kind": "checkpoint.saved", "step": 5, "path": "runs/a/checkpoints/step-5", "bytes": 409 * 2**20}
    assert describe({**saved, "seconds": 1.5, "stall_seconds": 0.021}) == [
        "checkpoint saved: runs/a/checkpoints/step-5 (409 MiB, written in 1.5s, training waited 21ms)"
    ]
    assert describe({"kind": "checkpoint.failed", "step": 5, "reason": "disk full"}) == [
        "checkpoint of step 5 FAILED: disk full"
    ]
    assert describe({"kind": "warning", "message": "seen", "hint": "do"}) == ["warning: seen", "  -> do"]
    assert describe({"kind": "sample", "step": 9, "prompt": "从前", "text": "有座山\n山里"}) == [
        "sample at step 9:",
        "  从前有座山",
        "  山里",
    ]
    assert describe({"kind": "run.start", "text": "one\ntwo"}) == ["one", "two"]
    assert describe({"kind": "something.new"}) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s ago"), (61, "1 min ago"), (3600, "60 min ago"), (7200, "2.0 h ago")]
)
def test_ages(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_plain_lines_are_spaced_in_time_and_the_last_step_is_always_there() -> None:
    clock = Clock()
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream=stream, plain_seconds=10, clock=clock)
    sink.open()
    for step in range(1, 31):
        clock.now = float(step)
        sink.write({"kind": "step", "step": step, "total_steps": 30, "loss": 1.0})
    sink.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/30", "11/30", "21/30", "30/30"]


def test_checkpoint_age_is_shown() -> None:
    clock = Clock()
    stream = io.StringIO()
    sink = ConsoleSink("plain", stream=stream, plain_seconds=0, clock=clock)
    sink.open()
    sink.write({"kind": "checkpoint.saved", "step": 1, "path": "p"})
    clock.now = 125.0
    sink.write(STEP)
    assert "ckpt 2 min ago" in stream.getvalue()


def test_plain_output_has_neither_carriage_returns_nor_escapes() -> None:
    records = [STEP, {"kind": "eval", "step": 1, "loss": 2.0}, {"kind": "sample", "step": 1, "text": "中文"}, STEP]
    text = "\n".join(plain(records, plain_seconds=0))
    assert "\r" not in text
    assert "\x1b" not in text
    assert "中文" in text


def test_quiet_shows_only_what_somebody_must_know() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("quiet", stream=stream)
    sink.open()
    for record in (STEP, {"kind": "eval", "step": 1, "loss": 1.0}, {"kind": "warning", "message": "careful"}):
        sink.write(record)
    sink.close()
    assert stream.getvalue() == "warning: careful\n"


def test_a_terminal_without_utf8_loses_characters_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with open(path, "w", encoding="ascii") as stream:
        sink = ConsoleSink("plain", stream=stream)
        sink.open()
        sink.write({"kind": "warning", "message": "模型"})
    assert path.read_text(encoding="ascii") == "warning: \\u6a21\\u578b\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "rich"), ({"NO_COLOR": "1"}, "plain"), ({"CI": "true"}, "plain"), ({"TERM": "dumb"}, "plain")],
)
def test_auto_is_plain_wherever_a_live_line_would_hurt(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode("auto", Terminal()) == expected
    assert choose_mode("auto", io.StringIO()) == "plain"
    assert choose_mode("rich", io.StringIO()) == "rich"


def test_on_a_real_terminal_the_line_is_redrawn_and_the_last_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "70")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        with Monitor([ConsoleSink("auto", stream=stream)]) as monitor:
            for step in range(1, 4):
                emit("step", step=step, total_steps=3, loss=2.0, tokens_per_second=1000.0, eta_seconds=60.0)
            emit("eval", step=3, loss=1.5)
            emit("run.end", step=3, status="done")
        assert monitor.failures == {}
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    text = shown.decode("utf-8")
    assert "\x1b[" in text, "it is drawn with escapes"
    assert "\x1b[?25h" in text, "the cursor is back"
    assert "eval at step 3 | validation loss 1.5000" in text
    assert text.rindex("step 3/3 100.0% | loss 2.000") < text.rindex("run ended: done")


def test_a_closed_stream_is_a_failure_of_the_sink_only() -> None:
    stream = io.StringIO()
    stream.close()
    with Monitor([ConsoleSink("plain", stream=stream)]) as monitor:
        emit("step", step=1, total_steps=1, loss=1.0)
    assert "console" in monitor.failures
