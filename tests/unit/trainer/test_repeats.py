"""Several runs of one recipe: names, what is run again and what is not, failures, and the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, DivergedError, Interrupted
from trainwright.cli.train import _seeds
from trainwright.config import LoadedRecipe, load_recipe
from trainwright.trainer import repeat
from trainwright.trainer.run_folder import RunFolder, write_json

Train = Callable[[LoadedRecipe, Sequence[str]], object]


def recipe(runs: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": {"preset": "llama-1m"},
        "data": {"source": "python-stdlib"},
        "train": {"steps": 3, **train},
        "run": {"dir": str(runs), "name": "情感"},
    }


class Trained:
    """Stands for training: writes what a finished run writes, with results that depend on the seed."""

    def __init__(self, fails: dict[str, Exception] | None = None) -> None:
        self.names: list[str] = []
        self.fails = fails or {}

    def __call__(self, loaded: LoadedRecipe, own: Sequence[str]) -> None:
        name = str(loaded.recipe.run.name)
        self.names.append(name)
        folder = RunFolder(Path(loaded.recipe.run.dir) / name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.recipe.write_text(loaded.to_yaml(), encoding="utf-8")
        given = {
            key: loaded.values()[key]
            for key, origin in loaded.provenance.items()
            if origin.kind not in ("default", "rule")
        }
        write_json(folder.info, {"status": "running", "given": given})
        if name in self.fails:
            raise self.fails.pop(name)
        seed = loaded.recipe.train.seed
        report = {"validation": {"loss": 0.5 - seed / 10, "f1": 0.7 + seed / 100}, "test": {"f1": 0.6 + seed / 50}}
        write_json(folder.path / "report.json", report)
        folder.update_info(status="finished")


def test_seeds_run_in_folders_of_their_own_and_their_numbers_are_joined(tmp_path: Path) -> None:
    train = Trained()
    result = repeat(recipe(tmp_path), seeds=3, train=train)
    assert train.names == ["情感-seed0", "情感-seed1", "情感-seed2"]
    spread = result.summary["test"]["f1"]
    values = [0.6, 0.62, 0.64]
    assert spread.mean == pytest.approx(0.62)
    assert spread.deviation == pytest.approx(statistics.stdev(values))
    assert (spread.worst, spread.best, spread.runs) == (0.6, 0.64, 3)
    losses = result.summary["validation"]["loss"]
    assert (losses.worst, losses.best) == (0.5, 0.3), "of losses the least is best"
    written = json.loads((tmp_path / "情感-repeats.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in written["runs"]] == [0, 1, 2]
    assert written["summary"]["test"]["f1"]["best"] == 0.64
    table = result.table()
    assert table[0] == "情感: 3 of 3 runs finished"
    line = next(line for line in table if "test f1" in line)
    assert line.split()[2:] == ["0.6200", "0.0200", "0.6000", "0.6400", "3"]


def test_seeds_may_be_named_and_count_on_from_the_recipe(tmp_path: Path) -> None:
    train = Trained()
    repeat(recipe(tmp_path, seed=5), seeds=2, train=train)
    repeat(recipe(tmp_path), seeds=[7, 11], train=train)
    assert train.names == ["情感-seed5", "情感-seed6", "情感-seed7", "情感-seed11"]


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    result = repeat(recipe(tmp_path), seeds=1, train=Trained())
    assert result.summary["test"]["f1"].deviation is None
    assert any(" - " in line for line in result.table())


def test_what_has_finished_is_not_trained_again(tmp_path: Path) -> None:
    repeat(recipe(tmp_path), seeds=2, train=Trained())
    train = Trained()
    result = repeat(recipe(tmp_path), seeds=3, train=train)
    assert train.names == ["情感-seed2"]
    assert result.summary["test"]["f1"].runs == 3


def test_a_failure_does_not_lose_the_others_and_is_tried_again(tmp_path: Path) -> None:
    train = Trained({"情感-seed1": DivergedError("the loss is NaN")})
    result = repeat(recipe(tmp_path), seeds=3, train=train)
    assert [run.status for run in result.runs] == ["finished", "failed", "finished"]
    assert result.summary["test"]["f1"].runs == 2
    assert any("情感-seed1 failed: DivergedError: the loss is NaN" in line for line in result.table())
    again = Trained()
    assert not repeat(recipe(tmp_path), seeds=3, train=again).failed
    assert again.names == ["情感-seed1"]


def test_a_stop_ends_all_and_the_next_call_goes_on(tmp_path: Path) -> None:
    train = Trained({"情感-seed1": Interrupted("stopped by SIGTERM")})
    with pytest.raises(Interrupted):
        repeat(recipe(tmp_path), seeds=3, train=train)
    written = json.loads((tmp_path / "情感-repeats.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in written["runs"]] == ["finished", "waiting", "waiting"]
    again = Trained()
    repeat(recipe(tmp_path), seeds=3, train=again)
    assert again.names == ["情感-seed1", "情感-seed2"]


def test_finished_runs_of_another_recipe_are_not_taken_for_this_one(tmp_path: Path) -> None:
    repeat(recipe(tmp_path), seeds=2, train=Trained())
    train = Trained()
    with pytest.raises(ConfigError, match=r"optim\.lr: the run has 'auto', the recipe now says 0\.001"):
        repeat(recipe(tmp_path), seeds=2, overrides=["optim.lr=1e-3"], train=train)
    assert train.names == []
    repeat(recipe(tmp_path), seeds=2, overrides=["monitor.log_every=5 steps"], train=train)
    assert train.names == [], "what decides nothing may differ"
    with pytest.raises(ConfigError, match=r"train\.export: .* the recipe now says 'last'"):
        repeat(recipe(tmp_path), seeds=2, overrides=["train.export=last"], train=train)


def test_a_task_without_a_report_gives_its_last_evaluation(tmp_path: Path) -> None:
    class Text(Trained):
        def __call__(self, loaded: LoadedRecipe, own: Sequence[str]) -> None:
            super().__call__(loaded, own)
            folder = RunFolder(Path(loaded.recipe.run.dir) / str(loaded.recipe.run.name))
            (folder.path / "report.json").unlink()
            records = [{"kind": "eval", "loss": 3.0}, {"kind": "step", "loss": 9.0}, {"kind": "eval", "loss": 2.5}]
            folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    result = repeat(recipe(tmp_path), seeds=2, train=Text())
    assert result.summary == {"validation": {"loss": result.summary["validation"]["loss"]}}
    assert result.summary["validation"]["loss"].mean == 2.5


def test_a_loaded_recipe_can_be_repeated_too(tmp_path: Path) -> None:
    train = Trained()
    repeat(load_recipe(recipe(tmp_path)), seeds=1, overrides=["train.steps=4"], train=train)
    assert train.names == ["情感-seed0"]


def test_folds_take_the_place_of_the_share_that_a_recipe_holds_out(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Folds(Trained):
        def __call__(self, loaded: LoadedRecipe, own: Sequence[str]) -> None:
            super().__call__(loaded, own)
            seen.append((loaded.recipe.data.fold, loaded.recipe.data.validation))

    labelled = recipe(tmp_path) | {
        "model": {"preset": "bert-tiny"},
        "task": "classification",
        "data": {"source": "texts.jsonl", "validation": {"fraction": 0.1}},
    }
    repeat(labelled, folds=2, train=Folds())
    assert [(fold.index, fold.of, validation) for fold, validation in seen] == [(0, 2, "auto"), (1, 2, "auto")]

    for said, override in (
        ("dev.jsonl", "data.validation={source: dev.jsonl}"),
        (r"\{fraction: 0\.2\}", "data.validation={fraction: 0.2}"),
        ("none", "data.validation=none"),
    ):
        with pytest.raises(ConfigError, match=f"data.validation is {said}"):
            repeat(labelled, folds=2, overrides=[override], train=Folds())


@pytest.mark.parametrize("wrong", [{}, {"seeds": 0}, {"seeds": [1, 1]}, {"folds": 1}, {"seeds": [-1]}])
def test_nonsense_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        repeat(recipe(tmp_path), train=Trained(), **wrong)


def test_seeds_on_the_command_line() -> None:
    assert _seeds("3") == 3
    assert _seeds("0,7,11") == [0, 7, 11]
    assert _seeds("4,") == [4]
    assert _seeds(None) is None
    with pytest.raises(ConfigError, match="--seeds three"):
        _seeds("three")
