from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_datasets import ALPHABET, write_jsonl

from trainwright.data import baselines
from trainwright.data.baselines import fit_and_score
from trainwright.data.build import build_dataset
from trainwright.data.dataset import IGNORE, TokenDataset
from trainwright.data.documents import SourceSpec
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec
from trainwright.data.tokenizers import train_tokenizer


def split_dataset(folder: Path, train: list[str], held_out: list[str], packing: str = "best_fit") -> TokenDataset:
    sources = (write_jsonl(folder / "train.jsonl", train),)
    validation = ValidationSpec(sources=(write_jsonl(folder / "held.jsonl", held_out),))
    tokenizer = train_tokenizer("char", None, [ALPHABET])
    spec = BuildSpec(sources, tokenizer, sequence_length=8, packing=packing, validation=validation, append_eos=False)
    build_dataset(spec, folder / "dataset", workers=1)
    return TokenDataset.open(folder / "dataset")


def pairs_of(texts: list[str]) -> Counter[tuple[str, str]]:
    return Counter(pair for text in texts for pair in itertools.pairwise(text))


@pytest.mark.parametrize("dense", [True, False])
def test_equals_the_formulas_counted_by_hand(tmp_path: Path, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(baselines, "_DENSE_PAIRS", 0)
        monkeypatch.setattr(baselines, "_CHUNK_TOKENS", 64)
    train, held_out = ["the cat sat", "the hat", "a cat at the mat", "zz"] * 3, ["that cat", "a hat that qq"]
    dataset = split_dataset(tmp_path, train, held_out)
    found = fit_and_score(dataset)

    pairs, scored = pairs_of(train), pairs_of(held_out)
    labels, contexts = Counter[str](), Counter[str]()
    for (before, after), count in pairs.items():
        labels[after] += count
        contexts[before] += count
    total, vocabulary = sum(labels.values()), dataset.vocab_size
    unigram = {c: (labels[c] + 0.5) / (total + 0.5 * vocabulary) for c in ALPHABET}

    def leave_one_out(alpha: float) -> float:
        return sum(
            count * math.log((count - 1 + alpha * unigram[b]) / (contexts[a] - 1 + alpha))
            for (a, b), count in pairs.items()
        )

    alpha = max((2.0**power for power in range(-4, 19)), key=leave_one_out)
    assert found.alpha == alpha
    count = sum(scored.values())
    assert found.labels == count == dataset.facts("validation").trained_tokens
    one = -sum(times * math.log(unigram[b]) for (_, b), times in scored.items()) / count
    two = -sum(
        times * math.log((pairs[a, b] + alpha * unigram[b]) / (contexts[a] + alpha)) for (a, b), times in scored.items()
    )
    assert found.unigram == pytest.approx(one, rel=1e-12)
    assert found.bigram == pytest.approx(two / count, rel=1e-12)


def test_scores_exactly_the_labels_of_the_rows_given(tmp_path: Path) -> None:
    dataset = split_dataset(tmp_path, ["abcabcabcabc"] * 5, ["abc", "cba", "aabbcc"], packing="pad")
    parts = [fit_and_score(dataset, rows=np.asarray([row])) for row in range(dataset.rows("validation"))]
    whole = fit_and_score(dataset)
    assert sum(part.labels for part in parts) == whole.labels
    assert sum(part.bigram * part.labels for part in parts) / whole.labels == pytest.approx(whole.bigram)
    labels = dataset.batch("validation", np.asarray([1]))["labels"]
    assert parts[1].labels == int((labels != IGNORE).sum())


def test_text_that_follows_its_bigrams_scores_near_nothing(tmp_path: Path) -> None:
    cycle = "abcdefgh" * 200
    dataset = split_dataset(tmp_path, [cycle], [cycle[:800]])
    found = fit_and_score(dataset)
    assert found.unigram == pytest.approx(math.log(8), rel=0.02)
    assert found.bigram < 0.01


def test_tiny_shakespeare_gives_the_published_lines(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = SourceSpec(str(shared_data("tinyshakespeare/input.txt")))
    spec = BuildSpec((source,), TrainTokenizer("char"), sequence_length=64, validation=ValidationSpec(fraction=0.1))
    build_dataset(spec, tmp_path / "dataset")
    found = fit_and_score(TokenDataset.open(tmp_path / "dataset"))
    assert found.unigram == pytest.approx(3.347, abs=0.001)
    assert found.bigram == pytest.approx(2.484, abs=0.01)
    assert found.labels == 111_539
