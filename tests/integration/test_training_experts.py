"""A recipe with experts: alone, divided over ranks, resumed in another layout, exported to a folder of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.checkpoint import list_checkpoints
from trainwright.inference.checkpoints import load_checkpointed_model
from trainwright.models import load_pretrained
from trainwright.monitor import read_history
from trainwright.testing import run_ranks
from trainwright.trainer import Callback, Trainer

Tiny = Callable[..., dict[str, Any]]

MODEL: dict[str, Any] = {
    "family": "moe",
    "architecture": "dots1",
    "router_scores": "sigmoid",
    "qk_norm": True,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 64,
    "shared_size": 64,
    "dense_layers": [0],
    "auxiliary_weight": 0.001,
    "bias_rate": 0.01,
}


class Fall(Exception):
    """Stands for a process that ends without saving."""


class FallIn(Callback):
    name = "fall"

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, run: Any, report: Any) -> None:
        if run.state.step == self.step:
            raise Fall


def fit(rank: int, world: int, recipe: dict[str, Any], fall_in: int | None, resume: str) -> str:
    try:
        Trainer(recipe, resume=resume, callbacks=[FallIn(fall_in)]).fit()
    except Fall:
        return "fell"
    return "finished"


def recipe_for(tiny: Tiny, runs: Path, name: str, **parallel: Any) -> dict[str, Any]:
    recipe = tiny(runs, name)
    recipe["model"] = {"config": MODEL}
    recipe["train"] |= {"micro_batch": "auto", "eval_every": "6 steps"}
    return {**recipe, **({"parallel": parallel} if parallel else {})}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_history(folder / "metrics.jsonl", "step"))


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Trainer(recipe_for(tiny, tmp_path_factory.mktemp("experts"), "alone")).fit().folder


def test_loads_are_in_the_metrics_and_the_bias_in_the_model(alone: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    last = steps_of(alone)[-1]
    assert last["moe/imbalance"] >= 1
    assert 0.25 <= last["moe/layer_1/load_max"] <= 1
    assert last["moe/dropped"] == 0
    model = load_pretrained(alone / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.state_dict()[name]
    assert bias.abs().max() >= 0.01 - 1e-6
    saved = load_checkpointed_model(list_checkpoints(alone / "checkpoints")[-1].path)
    assert torch.equal(saved.state_dict()[name], bias)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(alone / "model").eval()
    x = torch.randint(0, 512, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_divided_then_otherwise_then_alone_is_the_run_of_one(tiny: Tiny, alone: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny, tmp_path, "many", expert=2, zero=3)
    assert run_ranks(fit, 2, recipe, 5, "never", timeout=120) == ["fell"] * 2
    recipe["parallel"] = {"tensor": 2, "expert": 1, "shard": "auto"}
    assert run_ranks(fit, 2, recipe, 8, "auto", timeout=120) == ["fell"] * 2
    recipe["parallel"] = {"tensor": 1, "shard": "auto"}
    assert fit(0, 1, recipe, None, "auto") == "finished"
    mine, theirs = steps_of(tmp_path / "many"), steps_of(alone)
    by_step = {record["step"]: record for record in mine}  # a step that was done again counts as done the last time
    assert sorted(by_step) == list(range(1, 13))
    for record in theirs:
        assert by_step[record["step"]]["loss"] == pytest.approx(record["loss"], rel=1e-5), record["step"]
        assert by_step[record["step"]]["moe/imbalance"] == pytest.approx(record["moe/imbalance"], rel=1e-6)
    ours, expected = (load_pretrained(folder / "model").state_dict() for folder in (tmp_path / "many", alone))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(ours[name], expected[name])
