"""Folds of a cross-validation: together all records, never one twice, equally large, the same at every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_examples import Tiny, build

from trainwright.base.errors import ConfigError, DataError
from trainwright.config import load_recipe
from trainwright.data.examples.intake import held_out_fold

RECORDS = [{"text": f"文本 {number}", "label": "ab"[number % 2]} for number in range(23)]


def texts(dataset: Any, split: str) -> set[str]:
    return {str(record["text"]) for record in dataset.records_of(split)}


def test_every_record_is_validated_on_once(tmp_path: Path) -> None:
    seen: list[str] = []
    for index in range(5):
        dataset = build(tmp_path, RECORDS, Tiny("label"), fold=(index, 5))
        held, trained = texts(dataset, "validation"), texts(dataset, "train")
        assert len(held) in (4, 5)
        assert not held & trained
        assert len(held | trained) == 23
        again = build(tmp_path, RECORDS, Tiny("label"), fold=(index, 5))
        assert texts(again, "validation") == held
        seen += held
    assert len(seen) == len(set(seen)) == 23


def test_records_of_one_key_stay_together_and_folds_are_balanced() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 200, dtype=np.uint64)
    hashes = np.concatenate([hashes, hashes[:40]])
    folds = [held_out_fold(hashes, index, 4) for index in range(4)]
    assert np.sum(folds, axis=0).tolist() == [1] * 240
    for fold in folds:
        assert (fold[:40] == fold[200:]).all()
        assert 55 <= int(fold.sum()) <= 65


def test_more_folds_than_records_are_refused() -> None:
    with pytest.raises(DataError, match="3 training records do not fill 4 folds"):
        held_out_fold(np.arange(3, dtype=np.uint64), 0, 4)


def recipe(**data: Any) -> dict[str, Any]:
    return {
        "model": {"preset": "llama-1m"},
        "task": "classification",
        "data": {"source": "texts.jsonl", "fold": {"index": 1, "of": 5}, **data},
    }


def test_a_recipe_names_a_fold() -> None:
    assert load_recipe(recipe()).recipe.data.fold.of == 5  # type: ignore[union-attr]
    loaded = load_recipe(recipe(tokenizer={"train": "char"}))
    assert load_recipe(loaded.recipe.to_dict()).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fold": {"index": 5, "of": 5}}, "below data.fold.of, 5"),
        ({"fold": {"index": 0, "of": 1}}, "a whole number >= 2"),
        ({"validation": {"fraction": 0.1}}, "the fold is what is validated on"),
    ],
)
def test_a_fold_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(recipe(**changes))


def test_running_text_has_no_folds() -> None:
    with pytest.raises(ConfigError, match="learns from running text"):
        load_recipe({**recipe(), "task": "causal_lm"})
