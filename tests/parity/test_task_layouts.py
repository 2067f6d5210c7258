"""Every task trains the same on any number of ranks, at any ZeRO stage, in any micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainwright.monitor import read_history
from trainwright.testing import run_ranks
from trainwright.trainer import Trainer

SAMPLES = Path(__file__).resolve().parents[2] / "examples" / "samples"
STEPS, ROWS, LENGTH = 4, 8, 64

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
BERT = {"family": "bert", **SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.0, "max_position_embeddings": LENGTH}
LLAMA = {"family": "llama", **SIZES, "num_kv_heads": 2, "head_dim": 8}

TASKS: dict[str, dict[str, Any]] = {
    "classification": {
        "model": {"config": BERT},
        "task": {"name": "classification", "class_weights": "auto", "r_drop": 1.0},
        "data": {"source": str(SAMPLES / "questions.txt"), "format": "label_text", "tokenizer": {"train": "word"}},
    },
    "ner": {
        "model": {"config": BERT},
        "task": {"name": "ner", "crf": True},
        "data": {"source": str(SAMPLES / "entities.conll"), "tokenizer": {"train": "wordpiece", "vocab_size": 300}},
    },
    "qa": {
        "model": {"config": BERT},
        "task": {"name": "qa", "max_question": 16},
        "data": {"source": str(SAMPLES / "answers.json"), "tokenizer": {"train": "wordpiece", "vocab_size": 300}},
    },
    "masked_lm": {
        "model": {"config": BERT},
        "task": {"name": "masked_lm", "masking": "word"},
        "data": {
            "source": str(SAMPLES / "reviews.tsv"),
            "tokenizer": {"train": "wordpiece", "vocab_size": 300},
        },
    },
    "sft": {
        "model": {"config": LLAMA},
        "task": {"name": "sft", "max_new_tokens": 4},
        "data": {"source": str(SAMPLES / "chats.jsonl"), "tokenizer": {"train": "bpe", "vocab_size": 400}},
    },
    "translation": {
        "model": {"config": LLAMA},
        "task": {"name": "translation"},
        "data": {"source": str(SAMPLES / "pairs.jsonl"), "tokenizer": {"train": "bpe", "vocab_size": 400}},
    },
}


def recipe_for(task: str, folder: str, name: str, **changes: Any) -> dict[str, Any]:
    parts = TASKS[task]
    data = {"sequence_length": LENGTH, "cache": f"{folder}/cache", "validation": {"fraction": 0.2}}
    train = {"steps": STEPS, "batch_tokens": ROWS * LENGTH, "eval_every": f"{STEPS} steps", "compile": False}
    recipe: dict[str, Any] = {
        "model": parts["model"],
        "task": parts["task"],
        "data": {**data, "max_drop": 0.5, **parts["data"], **changes.pop("data", {})},
        "train": {**train, "threads": 1, "eval_answers": 0, **changes.pop("train", {})},
        "optim": {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1},
        "precision": "fp32",
        "checkpoint": {"save_final": False, "keep_best": False},
        "monitor": {"console": "quiet", "tensorboard": False, "log_every": "1 steps"},
        "run": {"dir": folder, "name": name},
    }
    return {**recipe, **changes}


def course(folder: str, name: str) -> list[list[float]]:
    """Loss and norm of the gradient of every step, then the validation loss."""
    path = Path(folder) / name / "metrics.jsonl"
    steps = [[record["loss"], record["grad_norm"]] for record in read_history(path, "step")]
    return [*steps, [record["loss"] for record in read_history(path, "eval")]]


def fit(rank: int, world: int, folder: str, cases: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    found = []
    for task, name, changes in cases:
        Trainer(recipe_for(task, folder, name, **changes)).fit()
        found.append(course(folder, name))
    return found


def alone(folder: Path, task: str, name: str = "alone", **changes: Any) -> list[list[float]]:
    return list(fit(0, 1, str(folder), [(task, f"{task}-{name}", changes)])[0])


def assert_equal(found: list[list[float]], expected: list[list[float]], case: str) -> None:
    assert len(found) == len(expected) == STEPS + 1, case
    assert found[0] == pytest.approx(expected[0], rel=1e-6), case  # before rounding has been multiplied by any step
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5), (case, step)


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_do_not_change_the_training(tmp_path: Path, task: str) -> None:
    expected = alone(tmp_path, task)
    assert_equal(alone(tmp_path, task, "small", train={"micro_batch": 2}), expected, task)


def check_ranks(folder: Path, world: int, stages: dict[str, list[int]]) -> None:
    expected = {task: alone(folder, task) for task in stages}
    cases = [(task, f"{task}-{world}-{zero}", {"parallel": {"zero": zero}}) for task in stages for zero in stages[task]]
    of_first = run_ranks(fit, world, str(folder), cases, timeout=600)[0]
    for (task, name, _), found in zip(cases, of_first, strict=True):
        assert_equal(found, expected[task], name)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    check_ranks(tmp_path, 2, {"classification": [2], "ner": [3], "qa": [1], "masked_lm": [0], "sft": [3]})


@pytest.mark.slow
def test_two_ranks_train_as_one_at_every_stage(tmp_path: Path) -> None:
    check_ranks(tmp_path, 2, {task: [0, 1, 2, 3] for task in TASKS})


@pytest.mark.slow
def test_four_ranks_train_as_one(tmp_path: Path) -> None:
    check_ranks(tmp_path, 4, {task: [1, 3] for task in TASKS})
