"""Loaders of examples: transforms by draw numbers, evaluation, rows of similar length together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import build as build_text
from tiny_examples import build, pairs

from trainwright.base.errors import DataError
from trainwright.base.seeds import derive_seed
from trainwright.data.dataset import TokenDataset
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.length_order import WINDOW_BATCHES, LengthOrder
from trainwright.data.loader import Arrays, Loader, evaluation_batches
from trainwright.data.mixture import RowOrder

ROWS = 53
EPOCH_BATCHES = 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ExampleDataset:
    lengths = [4 + (7 * n) % 29 for n in range(ROWS)]
    return build(tmp_path_factory.mktemp("loader"), pairs(lengths))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return build_text(tmp_path_factory.mktemp("text"), [f"{n:03d}abcd" for n in range(29)], packing="pad")


def noise(arrays: Arrays, draws: np.ndarray) -> Arrays:
    """Stands for masking: a number for each row that depends on its draw alone."""
    drawn = np.asarray([derive_seed("noise", int(draw)) % 1000 for draw in draws])
    return {**arrays, "noise": drawn, "draws": draws}


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["rows"].tolist()


def test_transforms_see_global_draws(dataset: ExampleDataset) -> None:
    whole = Loader(dataset, 6, seed=3, transform=noise, prefetch=2)
    for step in range(3 * EPOCH_BATCHES):
        batch = next(whole)
        assert batch["draws"].tolist() == list(range(step * 6, step * 6 + 6))
        for world in (2, 3):
            parts = [Loader(dataset, 6, 3, r, world, transform=noise, prefetch=0).batch(step) for r in range(world)]
            for name in ("rows", "noise", "draws"):
                assert torch.cat([part[name] for part in parts]).tolist() == batch[name].tolist(), name
    whole.close()


def test_a_row_is_changed_otherwise_in_every_epoch(dataset: ExampleDataset) -> None:
    loader = Loader(dataset, ROWS, seed=0, transform=noise, prefetch=0)
    epochs = [loader.batch(step) for step in range(2)]
    first, second = (dict(zip(rows_of(b), b["noise"].tolist(), strict=True)) for b in epochs)
    assert first.keys() == second.keys()
    assert sum(first[row] != second[row] for row in first) > ROWS // 2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_transforms_by_row_and_blanks_what_fills_up(dataset: ExampleDataset, world: int) -> None:
    seen: dict[int, int] = {}
    labels = 0
    for rank in range(world):
        batches = list(evaluation_batches(dataset, 8, "train", rank=rank, world=world, transform=noise))
        assert len(batches) == -(-ROWS // 8)
        for batch in batches:
            labels += int((batch["labels"] != -100).sum())
            for row, drawn, number in zip(
                rows_of(batch), batch["draws"].tolist(), batch["noise"].tolist(), strict=True
            ):
                if row < 0:
                    continue
                assert drawn == row
                assert row not in seen
                seen[row] = number
    assert sorted(seen) == list(range(ROWS))
    assert labels == dataset.facts("train").trained_tokens
    assert seen == {row: derive_seed("noise", row) % 1000 for row in range(ROWS)}


def test_running_text_is_blanked_and_transformed_too(text: TokenDataset) -> None:
    labels = [int((batch["labels"] != -100).sum()) for batch in evaluation_batches(text, 4, "train", transform=noise)]
    assert sum(labels) == text.facts("train").trained_tokens
    assert labels[-1] < labels[0]
    assert Loader(text, 4, transform=noise, prefetch=0).batch(2)["draws"].tolist() == [8, 9, 10, 11]


def test_the_state_is_what_it_was(dataset: ExampleDataset) -> None:
    loader = Loader(dataset, 4, seed=1, transform=noise)
    next(loader)
    loader.close()
    assert loader.state_dict() == {
        "schema": 1,
        "seed": 1,
        "split": "train",
        "rows_consumed": 4,
        "fingerprint": dataset.fingerprint,
    }


@settings(deadline=None, max_examples=40)
@given(data=st.data(), grouped=st.booleans(), rows=st.sampled_from([4, 6, 12]), steps=st.integers(1, 30))
def test_any_world_size_and_any_kills_see_the_same_rows(
    dataset: ExampleDataset, data: st.DataObject, grouped: bool, rows: int, steps: int
) -> None:
    options: dict[str, Any] = {"seed": 2, "prefetch": 0, "transform": noise, "group_by_length": grouped}

    def facts(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
        return list(zip(rows_of(batch), batch["noise"].tolist(), strict=True))

    undisturbed = [facts(Loader(dataset, rows, **options).batch(step)) for step in range(steps)]
    worlds = [world for world in range(1, rows + 1) if rows % world == 0]
    ledger: list[list[tuple[int, int]]] = []
    state = Loader(dataset, rows, **options).state_dict()
    while len(ledger) < steps:
        world = data.draw(st.sampled_from(worlds))
        ranks = [Loader(dataset, rows, rank=rank, world=world, **options) for rank in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(1, 9))):
            if len(ledger) < steps:
                ledger.append([one for loader in ranks for one in facts(next(loader))])
        assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)
        state = ranks[0].state_dict()
    assert ledger == undisturbed


# ---- rows of similar length together


def test_grouping_keeps_every_row_once_per_window_of_the_plain_order(dataset: ExampleDataset) -> None:
    plain = RowOrder(dataset.groups("train"), 7)
    grouped = LengthOrder(plain, dataset.lengths("train"), 3)
    size = 3 * WINDOW_BATCHES
    for window in range(5):
        draws = np.arange(window * size, (window + 1) * size)
        assert sorted(grouped(draws).tolist()) == sorted(plain(draws).tolist())
    scattered = np.asarray([5, size * 3, 2, size - 1, size * 9 + 4])
    assert grouped(scattered).tolist() == [int(grouped(np.asarray([one]))[0]) for one in scattered]
    assert grouped(np.arange(size)).tolist() != plain(np.arange(size)).tolist()
    other = LengthOrder(RowOrder(dataset.groups("train"), 8), dataset.lengths("train"), 3)
    assert other(np.arange(size)).tolist() != grouped(np.arange(size)).tolist()


def test_grouping_leaves_less_padding_and_batches_stay_in_random_order(dataset: ExampleDataset) -> None:
    lengths = dataset.lengths("train")

    def spread(grouped: bool) -> tuple[int, list[int]]:
        loader = Loader(dataset, 4, seed=1, prefetch=0, group_by_length=grouped)
        drawn = [lengths[loader.rows(step)] for step in range(WINDOW_BATCHES)]
        return sum(int((one.max() - one).sum()) for one in drawn), [int(one.mean()) for one in drawn]

    plain, grouped = spread(False), spread(True)
    assert grouped[0] < 0.2 * plain[0]
    assert grouped[1] != sorted(grouped[1])


def test_a_grouped_run_goes_on_in_its_order_with_other_batches(dataset: ExampleDataset) -> None:
    first = Loader(dataset, 4, seed=1, prefetch=0, group_by_length=True)
    order = first._source.order
    for _ in range(5):
        next(first)
    resumed = Loader(dataset, 6, seed=1, prefetch=0, group_by_length=True)
    resumed.load_state_dict(first.state_dict())
    assert first.state_dict()["group_rows"] == 4
    drawn = [row for _ in range(20) for row in rows_of(next(resumed))]
    assert drawn == order(np.arange(20, 140)).tolist()
    plain = Loader(dataset, 4, seed=1)
    with pytest.raises(DataError, match="with grouping them by length"):
        plain.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="without grouping"):
        first.load_state_dict(plain.state_dict())


def test_grouping_a_mixture_keeps_its_shares(tmp_path: Path) -> None:
    from tiny_examples import Tiny, read_lines, write_records

    from trainwright.data.documents import SourceSpec
    from trainwright.data.examples.build import build_examples
    from trainwright.data.examples.spec import ExampleSpec
    from trainwright.data.spec import TrainTokenizer

    sources = tuple(
        SourceSpec(write_records(tmp_path / f"{name}.jsonl", pairs(lengths)).source, weight=weight, name=name)
        for name, weight, lengths in (("a", 3.0, [5, 20, 9]), ("b", 1.0, [7, 18, 9, 30, 4]))
    )
    spec = ExampleSpec(sources, validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32, weighted=True)
    mixture = build_examples(spec, Tiny(), tmp_path / "cache", reader=read_lines)
    loader = Loader(mixture, 4, prefetch=0, group_by_length=True)
    drawn = [row for step in range(WINDOW_BATCHES) for row in rows_of(loader.batch(step))]
    assert sum(row < 3 for row in drawn) == 3 * WINDOW_BATCHES
