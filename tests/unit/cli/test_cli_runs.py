"""Run folders read back: progress of every kind of run, damage passed over, comparison side by side."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.text import display_width
from trainwright.cli import main as cli
from trainwright.cli.run_folder import find_run, list_runs, read_metrics, read_run

RECIPE = "model: {{preset: llama-15m}}\ndata: {{source: a.txt}}\ntrain: {{steps: 20}}\noptim: {{lr: {lr}}}\n"


def make_run(
    root: Path, name: str, *, lr: float = 1e-3, loss: float = 3.5, speed: float = 41234.0, **info: Any
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    written = {
        "status": "finished",
        "parameters": 15_000_000,
        "environment": {"started": "2026-01-01T10:00:00+0000", "host": platform.node(), "pid": os.getpid()},
        "sessions": [{"started": "2026-01-01T10:00:00+0000"}],
        "result": {"steps": 20, "tokens": 10_240, "seconds": 192.0, "validation_loss": loss, "best_loss": loss},
        "measured": {"tokens_per_second": speed},
        **info,
    }
    (folder / "run.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(RECIPE.format(lr=lr), encoding="utf-8")
    records = [
        {"kind": "run.start", "total_steps": 20},
        {"kind": "step", "step": 10, "total_steps": 20, "tokens": 5120, "tokens_per_second": 40_000.0},
        {
            "kind": "eval",
            "step": 10,
            "tokens": 5120,
            "loss": loss + 0.5,
            "perplexity": 54.6,
            "baselines": {"unigram": 5.5},
        },
        {"kind": "eval", "step": 20, "tokens": 10_240, "loss": loss, "perplexity": 33.1, "baselines": {"unigram": 5.5}},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, "first"))
    assert (run.name, run.status, run.step, run.total_steps, run.tokens) == ("first", "finished", 20, 20, 10_240)
    assert (run.validation_loss, run.best_loss, run.tokens_per_second, run.seconds) == (3.5, 3.5, 41234.0, 192.0)


def test_a_running_one_is_as_far_as_its_metrics(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, "live", status="running", result=None, measured=None))
    assert (run.status, run.step, run.tokens, run.tokens_per_second) == ("running", 10, 5120, 40_000.0)
    assert run.validation_loss == 3.5


def test_a_run_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    environment = {"host": platform.node(), "pid": process.pid}
    assert read_run(make_run(tmp_path, "gone", status="running", environment=environment)).status == "died"
    elsewhere = {"host": "another-machine", "pid": process.pid}
    assert read_run(make_run(tmp_path, "far", status="running", environment=elsewhere)).status == "running"


def test_damaged_metrics_are_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "cut")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\xff\xfe\n[1]\n")
        file.write(b'{"kind": "eval", "step": 30, "loss": "NaN"}\n')
    kinds = [record["kind"] for record in read_metrics(folder)]
    assert kinds == ["run.start", "step", "eval", "eval", "eval"]
    assert list(read_metrics(tmp_path / "none")) == []


def test_runs_are_found_by_name_and_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "莎士比亚")
    assert find_run("莎士比亚", tmp_path / "runs") == folder
    assert find_run(str(folder), Path("elsewhere")) == folder
    with pytest.raises(ConfigError, match="Did you mean '莎士比亚'"):
        find_run("莎士比", tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"runs in .*: none"):
        find_run("x", tmp_path / "nothing")


def test_an_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path, "good")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_text("{", encoding="utf-8")
    assert {run.name: run.status for run in list_runs(tmp_path)} == {"good": "finished", "bad": "unreadable"}
    with pytest.raises(ConfigError, match="is not JSON"):
        read_run(bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path / "missing")


def test_the_list_is_straight_whatever_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "莎士比亚")
    make_run(tmp_path, "plain", speed=999.0)
    assert cli.main(["runs", "list", "--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len({display_width(line) for line in lines}) == 1
    assert "41.2k" in lines[2]
    assert "3m12s" in lines[1]


def test_no_runs_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "list", "--dir", str(tmp_path / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "one", sessions=[{"started": "2026-01-01T10:00:00", "error": "ValueError: 坏"}], status="failed")
    assert cli.main(["runs", "show", "one", "--dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "failed",
        "15M",
        "20/20",
        "evaluations (2)",
        "33.10",
        "unigram 5.5000",
        "error: ValueError: 坏",
        "--resume",
    ):
        assert part in text


def test_compare_shows_what_differs_and_marks_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "slow", lr=1e-3, loss=3.5, speed=1000.0)
    make_run(tmp_path, "fast", lr=3e-3, loss=3.2, speed=2000.0)
    assert cli.main(["runs", "compare", "slow", "fast", "--dir", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optim.lr", "0.001", "0.003"] in lines
    assert not any(line and line[0] == "train.steps" for line in lines)
    assert ["final", "loss", "3.5000", "3.2000", "*"] in lines
    assert ["tokens/s", "1k", "2k", "*"] in lines


def judged(folder: Path, *, task: str, metric: str, values: list[float], test: float) -> Path:
    """The run with evaluations and a report at the end that have the task's own metric."""
    (folder / "recipe.resolved.yaml").write_text(RECIPE.format(lr=1e-3) + f"task: {{name: {task}}}\n", encoding="utf-8")
    metrics = [{metric: value, "accuracy": 0.5} for value in values]
    records = [
        *(
            {"kind": "eval", "step": step, "tokens": step, "loss": 0.5, "metric": metric, "metrics": found}
            for step, found in enumerate(metrics, start=1)
        ),
        {"kind": "step", "step": 20, "total_steps": 20, "tokens": 640, "tokens_per_second": 64.0},
        {"kind": "report", "split": "validation", "loss": 0.5, "metric": metric, "metrics": {metric: max(values)}},
        {"kind": "report", "split": "test", "loss": 0.6, "metric": metric, "metrics": {metric: test}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder


def test_the_metric_of_the_task_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"tokens_per_second": 64.0, "inputs_per_second": 1900.0}
    entities = judged(
        make_run(tmp_path, "实体 1", measured=speeds), task="ner", metric="f1", values=[0.25, 0.75, 0.5], test=0.7
    )
    (entities / "model").mkdir()
    (entities / "model" / "config.json").write_text("{}", encoding="utf-8")
    run = read_run(entities)
    assert (run.metric, run.last_metric, run.best_metric) == ("f1", 0.5, 0.75)
    assert run.reported == {"validation": 0.75, "test": 0.7}
    assert (run.speed, run.tokens_per_second) == (1900.0, 64.0), "tokens that are read, and words that are labelled"
    judged(make_run(tmp_path, "texts"), task="translation", metric="bleu", values=[20.0, 31.5], test=30.0)
    make_run(tmp_path, "language")
    assert cli.main(["runs", "list", "--dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "f1 0.7500" in listed
    assert "bleu 31.50" in listed
    assert cli.main(["runs", "show", "实体 1", "--dir", str(tmp_path)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["f1", "0.5000", "(best", "0.7500)"] in shown
    assert ["test", "f1", "0.7000", "at", "the", "end"] in shown
    assert ["speed", "1.9k", "tokens/s", "read,", "64", "words/s", "trained"] in shown
    assert ["step", "words", "loss", "f1"] in shown
    assert ["2", "2", "0.5000", "0.7500"] in shown
    assert ["trainwright", "eval", f"'{tmp_path}/实体", "1'", "--split", "test"] in shown
    assert ["trainwright", "predict", f"'{tmp_path}/实体", "1'", "YOUR_FILE"] in shown
    assert cli.main(["runs", "compare", "实体 1", "texts", "--dir", str(tmp_path)]) == 0
    compared = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["best", "f1", "0.7500", "-"] in compared
    assert ["test", "bleu", "at", "the", "end", "-", "30.00"] in compared


def test_how_to_go_on_names_the_run_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "one", status="interrupted")
    assert cli.main(["runs", "show", "one", "--dir", str(tmp_path)]) == 0
    assert f"go on:  trainwright train {folder} --resume {folder}" in capsys.readouterr().out


def test_compare_needs_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "one")
    assert cli.main(["runs", "compare", "one", "--dir", str(tmp_path)]) == 2
    assert "expected two or more" in capsys.readouterr().err


def test_a_recipe_of_another_version_is_still_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "new")
    old = make_run(tmp_path, "old")
    (old / "recipe.resolved.yaml").write_text("optim: {lr: 0.5}\nretired: {key: 1}\n", encoding="utf-8")
    assert cli.main(["runs", "compare", "new", "old", "--dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "retired.key" in text
    assert ["optim.lr", "0.001", "0.5"] in [line.split() for line in text.splitlines()]
