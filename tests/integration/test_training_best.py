"""The best evaluation of a real run: its checkpoint stays, its weights are exported, on one rank and on two, and after
a stop in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainwright.trainer.trainer as trainer_module
from trainwright.base.errors import ConfigError, Interrupted
from trainwright.checkpoint import list_checkpoints, load_checkpoint
from trainwright.config import load_recipe
from trainwright.monitor import read_history
from trainwright.testing import run_ranks
from trainwright.trainer import Callback, Trainer, repeat

Tiny = Callable[..., dict[str, Any]]

SCORES = {4: 0.9, 8: 0.5, 12: 0.4}
"""What the evaluations of a run of 12 steps are made to say."""


@contextmanager
def scored(scores: dict[int, float]) -> Iterator[None]:
    """Inside, evaluations have a metric `f1`."""
    real = trainer_module.validate

    def validate(run: Any) -> Any:
        return replace(real(run), metrics={"f1": scores.get(run.state.step, 0.0), "accuracy": 0.5})

    trainer_module.validate = validate
    try:
        yield
    finally:
        trainer_module.validate = real


class Stop(Callback):
    """Asks for a stop after a step."""

    name = "stop"

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, run: Any, report: Any) -> None:
        if run.state.step == self.step:
            raise Interrupted("stopped by the test")


def recipe_for(tiny: Tiny, runs: Path, name: str) -> dict[str, Any]:
    recipe = tiny(runs, name)
    recipe["checkpoint"] = {"every": "5 steps", "keep": 1, "keep_best": {"metric": "f1"}, "asynchronous": False}
    return recipe


def fit(recipe: dict[str, Any], stop: int | None = None, resume: str = "never") -> Path:
    with scored(SCORES):
        return Trainer(recipe, resume=resume, callbacks=[Stop(stop)]).fit().folder


def fit_on_ranks(rank: int, world: int, recipe: dict[str, Any]) -> str:
    return str(fit(recipe))


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(recipe_for(tiny, tmp_path_factory.mktemp("runs"), "best"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_the_checkpoint_of_the_best_evaluation_stays_beside_the_newest(finished: Path) -> None:
    assert [found.step for found in list_checkpoints(finished / "checkpoints")] == [4, 12]


def test_its_weights_are_the_model_and_nothing_else_changed(finished: Path) -> None:
    best, _ = load_checkpoint(finished / "checkpoints" / "step-4")
    last, _ = load_checkpoint(finished / "checkpoints" / "step-12")
    exported = weights(finished)
    assert all(torch.equal(tensor, best["engine"]["model"][name]) for name, tensor in exported.items())
    assert not all(torch.equal(tensor, last["engine"]["model"][name]) for name, tensor in exported.items())
    assert last["train"]["step"] == 12
    kept = last["callbacks"]["best"]
    assert (kept["metric"], kept["value"], kept["step"]) == ("f1", 0.9, 4)


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_model(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny, tmp_path, "stopped")
    with pytest.raises(Interrupted):
        fit(recipe, stop=9)
    folder = fit(recipe, resume="auto")
    # The one that a session began with, step 5, stays as long as the session.
    assert [found.step for found in list_checkpoints(folder / "checkpoints")] == [4, 5, 12]
    one, other = weights(finished), weights(folder)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_with_divided_state_export_the_best_weights(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "ranks") | {"parallel": {"zero": 3}}
    assert len(set(run_ranks(fit_on_ranks, 2, recipe, timeout=120))) == 1
    one, other = weights(finished), weights(tmp_path / "ranks")
    best, _ = load_checkpoint(tmp_path / "ranks" / "checkpoints" / "step-4")
    for name, tensor in other.items():
        assert torch.equal(tensor, best["engine"]["model"][name])
        torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)


def test_the_last_weights_are_exported_on_request(tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "last")
    recipe["train"]["export"] = "last"
    folder = fit(recipe)
    last, _ = load_checkpoint(folder / "checkpoints" / "step-12")
    assert all(torch.equal(tensor, last["engine"]["model"][name]) for name, tensor in weights(folder).items())
    assert [found.step for found in list_checkpoints(folder / "checkpoints")] == [4, 12]


def test_a_metric_that_the_task_has_not_is_refused_before_the_first_step(tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "typo")
    recipe["checkpoint"]["keep_best"] = {"metric": "f2"}
    with scored(SCORES), pytest.raises(ConfigError, match=r"no metric is called 'f2' here; there are loss, f1"):
        Trainer(load_recipe(recipe)).fit()
    assert not list(read_history(tmp_path / "typo" / "metrics.jsonl", "step"))


def test_early_stopping_exports_the_weights_before_it_got_worse(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "early")
    recipe["train"]["early_stopping"] = {"patience": 1, "metric": "f1"}
    folder = fit(recipe)
    assert [record["step"] for record in read_history(folder / "metrics.jsonl", "eval")] == [4, 8]
    best, _ = load_checkpoint(folder / "checkpoints" / "step-4")
    assert all(torch.equal(tensor, best["engine"]["model"][name]) for name, tensor in weights(folder).items())


def test_averaged_weights_are_those_of_the_best_step(tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "averaged")
    recipe["train"]["ema"] = {"decay": 0.9}
    folder = fit(recipe)
    best, _ = load_checkpoint(folder / "checkpoints" / "step-4")
    averages = best["engine"]["ema"]["averages"]
    assert all(torch.equal(weights(folder)[name], average) for name, average in averages.items())


def test_frozen_parts_and_noise_of_a_recipe_reach_the_model(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "parts")
    recipe["train"] |= {"steps": 4, "freeze": ["embeddings", "layers.0"], "neftune_alpha": 5.0}
    recipe["checkpoint"] = {"every": "1 steps", "keep": 9}
    folder = Trainer(recipe).fit().folder
    first, _ = load_checkpoint(folder / "checkpoints" / "step-1")
    last, _ = load_checkpoint(folder / "checkpoints" / "step-4")
    same = {
        name for name, tensor in last["engine"]["model"].items() if torch.equal(tensor, first["engine"]["model"][name])
    }
    assert same == {name for name in last["engine"]["model"] if "embed_tokens" in name or "layers.0." in name}
    assert not any("layers.0." in name for name in last["engine"]["optimizer"]["parameters"])
    quiet = tiny(tmp_path, "quiet")
    quiet["train"] |= {"steps": 4, "freeze": ["embeddings", "layers.0"]}
    other = Trainer(quiet).fit().folder
    losses = [[r["loss"] for r in read_history(one / "metrics.jsonl", "step")] for one in (folder, other)]
    assert losses[0][0] != losses[1][0], "the noise is there from the first step"


def test_seeds_of_a_real_recipe(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "多次")
    recipe["train"]["steps"] = 4
    result = repeat(recipe, seeds=2)
    assert not result.failed
    spread = result.summary["validation"]["loss"]
    assert spread.runs == 2
    assert spread.deviation is not None
    assert spread.deviation > 0
    for seed in (0, 1):
        assert load_recipe(tmp_path / f"多次-seed{seed}" / "recipe.resolved.yaml").recipe.train.seed == seed
    trained: list[str] = []
    repeat(recipe, seeds=2, train=lambda loaded, own: trained.append(str(loaded.recipe.run.name)))
    assert trained == []


@pytest.mark.slow
def test_the_command_line_repeats_prints_a_table_and_goes_on(
    tiny: Tiny, tmp_path: Path, trainwright: Callable[..., Any]
) -> None:
    recipe = tiny(tmp_path / "runs", "seeds")
    recipe["train"]["steps"] = 2
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    done = trainwright("train", str(tmp_path / "recipe.yaml"), "--seeds", "0,3")
    assert done.returncode == 0, done.stderr
    assert "seeds: 2 of 2 runs finished" in done.stdout
    assert (tmp_path / "runs" / "seeds-seed3" / "model" / "model.safetensors").is_file()
    again = trainwright("train", str(tmp_path / "recipe.yaml"), "--seeds", "0,3", "optim.lr=1.0")
    assert again.returncode != 0
    assert "seeds-seed0 has finished with other values" in again.stderr
    two = trainwright("train", str(tmp_path / "recipe.yaml"), "--seeds", "2", "launch.processes=2", "run.name=two")
    assert two.returncode == 0, two.stderr
    assert "two: 2 of 2 runs finished" in two.stdout
    text = ("data.validation=auto", "run.name=text")
    refused = trainwright("train", str(tmp_path / "recipe.yaml"), "--folds", "2", *text)
    assert refused.returncode != 0
    assert "learns from running text" in refused.stderr
