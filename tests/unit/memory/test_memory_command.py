"""`trainwright memory`: predictions for every stage, and a real step counted beside them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from trainwright.cli.main import main

RECIPE = """
model: {preset: llama-1m}
data:
  source: %s
  tokenizer: {train: bpe, vocab_size: 4096}
  sequence_length: 64
train: {steps: 10, batch_tokens: 1024, micro_batch: 4, compile: false}
precision: fp32
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("memory")
    text = folder / "text.txt"
    text.write_text("水手们把船修好了。The shipwright planes a plank.\n" * 400, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE % json.dumps(str(text)), encoding="utf-8")
    return str(path)


def test_every_stage_for_every_number_of_ranks(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", recipe, "--ranks", "1,4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predicted"]
    assert [(row["ranks"], row["zero"]) for row in rows] == [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    alone, replicated, *sharded = rows
    assert replicated["total"] == alone["total"]
    for row in sharded:
        assert row["optimizer"] == alone["optimizer"] / 4
    assert main(["memory", recipe, "--ranks", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["ranks", "zero", "parameters"]
    assert [line.split()[:2] for line in lines[3:7]] == [["2", str(zero)] for zero in range(4)]


def test_a_step_is_counted_beside_its_prediction(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", recipe, "--measure", "--json", "--ranks", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    counted, predicted = found["counted"], found["predicted"][0]
    assert counted["parameters"] == predicted["parameters"]
    assert counted["gradients"] == predicted["gradients"]
    # Beside the moments there is a step count of 4 bytes for each tensor.
    assert 0 <= counted["optimizer"] - predicted["optimizer"] < 1000
    assert counted["activations"] > 0
    assert counted["process"]["resident"] > counted["total"]


@pytest.mark.parametrize(
    "part",
    [
        ["adapter={name: lora, rank: 4}"],
        ["adapter={name: qlora, rank: 4}", "precision=bf16"],
        ["train.freeze=[embeddings, layers.0]"],
    ],
    ids=["lora", "qlora in bf16", "frozen parts"],
)
def test_what_is_not_trained_has_no_gradients_and_no_state(
    part: list[str], recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", recipe, *part, "--measure", "--json", "--ranks", "1,2"]) == 0
    found = json.loads(capsys.readouterr().out)
    counted, predicted, sharded = found["counted"], found["predicted"][0], found["predicted"][2]
    assert counted["parameters"] == predicted["parameters"]
    assert counted["gradients"] == predicted["gradients"] < 0.5 * predicted["parameters"]
    assert 0 <= counted["optimizer"] - predicted["optimizer"] < 1000
    assert sharded["optimizer"] == predicted["optimizer"] / 2
    assert main(["memory", recipe, *part, "--ranks", "1"]) == 0
    assert "only these have gradients and optimizer state" in capsys.readouterr().out


def test_state_on_disk_is_measured_as_such(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["memory.optimizer_state=nvme", f"memory.nvme_path={tmp_path}", "memory.recompute=full"]
    assert main(["memory", recipe, *options, "--measure", "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert "optimizer on disk" in out
    assert "recompute full" in out
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_refused_is_shown_with_the_reason(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = importlib.import_module("trainwright.trainer.settle")
    real = settle.machine_facts
    monkeypatch.setattr(settle, "machine_facts", lambda: replace(real(), memory_bytes=1 << 20))
    assert main(["memory", recipe, "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert "would be refused" in out
    assert "needs about" in out


def test_numbers_of_ranks_are_checked(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("two", "0", ""):
        assert main(["memory", recipe, "--ranks", wrong]) == 2
        assert "--ranks" in capsys.readouterr().err


def test_a_layout_is_predicted_on_the_ranks_that_can_form_it(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    divided = ["parallel.tensor=2", "parallel.pipeline=2"]
    assert main(["memory", recipe, *divided, "--ranks", "2,4,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["predicted"]
    assert [(row["ranks"], row["zero"]) for row in rows] == [(4, 0), (8, 0), (8, 1), (8, 2), (8, 3)]
    assert {(row["tensor"], row["stages"], row["context"]) for row in rows} == {(2, 2, 1)}
    assert "needs a multiple of 4 processes, and there are 2" in found["refused"]["2"]
    assert main(["memory", recipe, "--ranks", "4", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["predicted"][0]
    assert rows[0]["optimizer"] < 0.45 * whole["optimizer"]
    assert rows[0]["sent"] > 0
    assert main(["memory", recipe, *divided, "--ranks", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2].split()[:4] == ["ranks", "zero", "tensor", "stages"]
    assert "sent: by each rank, per step" in out


def test_shards_inside_larger_worlds_are_predicted(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", recipe, "parallel.zero=3", "parallel.shard=2", "--ranks", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predicted"]
    assert [row["zero"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["optimizer"] == pytest.approx(rows[0]["optimizer"] / 2, rel=0.01)
