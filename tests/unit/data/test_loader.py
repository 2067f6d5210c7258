from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import ALPHABET, build, write_jsonl

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault
from trainwright.data.build import build_dataset
from trainwright.data.dataset import TokenDataset
from trainwright.data.loader import Loader, evaluation_batches, evaluation_rows
from trainwright.data.mixture import RowGroup, RowOrder
from trainwright.data.spec import BuildSpec
from trainwright.data.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """37 rows, each recognisable by its tokens."""
    texts = [f"{number:03d}{chr(97 + number % 26)}" for number in range(37)]
    return build(tmp_path_factory.mktemp("loader"), texts, packing="pad", sequence_length=8)


def row_ids(dataset: TokenDataset, batch: dict[str, torch.Tensor]) -> list[int]:
    """Which rows of the dataset stand in a batch, by their content."""
    everything = dataset.batch("train", np.arange(dataset.rows("train")))["input_ids"]
    known = {tuple(row.tolist()): number for number, row in enumerate(everything)}
    return [known[tuple(row.tolist())] for row in batch["input_ids"]]


def test_a_batch_is_a_pure_function_of_its_step(dataset: TokenDataset) -> None:
    loader = Loader(dataset, 5, seed=1)
    ahead = [next(loader) for _ in range(20)]
    for step in (19, 0, 7):
        again = loader.batch(step)
        for name, tensor in ahead[step].items():
            assert torch.equal(tensor, again[name])
    assert ahead[0]["input_ids"].dtype == torch.int64
    loader.close()


def test_every_epoch_has_every_row_once_and_nothing_is_dropped(dataset: TokenDataset) -> None:
    loader = Loader(dataset, 5, seed=1, prefetch=2)
    drawn = [row for _ in range(37) for row in row_ids(dataset, next(loader))]
    for epoch in range(5):
        assert sorted(drawn[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert drawn[:37] != drawn[37:74]
    assert loader.epoch == 5
    loader.close()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 5), rows=st.sampled_from([6, 12, 24]), steps=st.integers(1, 12))
def test_ledger_equals_the_undisturbed_run(
    dataset: TokenDataset,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    seed: int,
    rows: int,
    steps: int,
) -> None:
    """Killed at any step and resumed with any world size that divides the batch: the same rows in the same steps."""
    dataset = data.draw(st.sampled_from([dataset, mixture_dataset(tmp_path_factory)]))
    undisturbed = [row_ids(dataset, Loader(dataset, rows, seed=seed).batch(step)) for step in range(steps)]
    worlds = [world for world in range(1, rows + 1) if rows % world == 0]
    ledger: list[list[int]] = []
    state = Loader(dataset, rows, seed=seed).state_dict()
    while len(ledger) < steps:
        world = data.draw(st.sampled_from(worlds))
        ranks = [Loader(dataset, rows, seed=seed, rank=rank, world=world, prefetch=0) for rank in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(1, 5))):  # then this life is killed
            if len(ledger) == steps:
                break
            ledger.append([row for loader in ranks for row in row_ids(dataset, next(loader))])
        states = [loader.state_dict() for loader in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert ledger == undisturbed


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    rows=st.sampled_from([4, 6]),
    change=st.integers(1, 6),
)
def test_ledger_of_a_mixture_survives_other_batch_sizes(
    tmp_path_factory: pytest.TempPathFactory, weights: list[int], rows: int, change: int
) -> None:
    """The draws go on in order when a resumed run changes its batch: no row twice, none left out."""
    dataset = mixture_dataset(tmp_path_factory)
    groups = dataset.groups("train")
    chosen = tuple(
        RowGroup(group.name, group.first_row, group.rows, float(weight))
        for group, weight in zip(groups, [*weights, 1, 1, 1], strict=False)
    )[: max(2, min(len(groups), len(weights)))]
    order = RowOrder(chosen, seed=0)
    draws = order(np.arange(200))
    resumed = np.concatenate([order(np.arange(a, min(a + change, 200))) for a in range(rows * 3, 200, change)])
    assert np.array_equal(np.concatenate([draws[: rows * 3], resumed]), draws)
    shares = np.asarray([group.weight for group in chosen]) / sum(group.weight or 0 for group in chosen)
    for number, group in enumerate(chosen):
        inside = (draws >= group.first_row) & (draws < group.first_row + group.rows)
        assert abs(int(inside.sum()) - 200 * shares[number]) < 1


_mixtures: list[TokenDataset] = []


def mixture_dataset(factory: pytest.TempPathFactory) -> TokenDataset:
    if not _mixtures:
        folder = factory.mktemp("mixture")
        sources = tuple(
            write_jsonl(folder / f"{name}.jsonl", [f"{name}{number:03d}" for number in range(count)])
            for name, count in (("a", 7), ("b", 19), ("c", 50))
        )
        spec = BuildSpec(
            sources, train_tokenizer("char", None, [ALPHABET]), packing="pad", sequence_length=8, validation=None,
            weighted=True, append_eos=False,
        )  # fmt: skip
        build_dataset(spec, folder / "dataset", workers=1)
        _mixtures.append(TokenDataset.open(folder / "dataset"))
    return _mixtures[0]


def test_a_changed_dataset_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    other = build(tmp_path, ["something else"], packing="pad")
    state = Loader(dataset, 4).state_dict()
    with pytest.raises(DataError) as caught:
        Loader(other, 4).load_state_dict(state)
    assert dataset.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    with pytest.raises(DataError, match="seed 0, now it is 9"):
        Loader(dataset, 4, seed=9).load_state_dict(state)
    with pytest.raises(DataError, match="schema"):
        Loader(dataset, 4).load_state_dict({**state, "schema": 99})


def test_a_batch_that_does_not_divide_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match=r"10 rows cannot be divided among 4 processes(.|\n)*use 8 or 12 rows"):
        Loader(dataset, 10, world=4)
    with pytest.raises(ConfigError, match="use 4 rows"):
        Loader(dataset, 3, world=4)
    with pytest.raises(ConfigError, match="rank 4 of 4"):
        Loader(dataset, 4, rank=4, world=4)


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_prefetch_thread_ends_with_its_loader(dataset: TokenDataset) -> None:
    before = prefetch_threads()
    with Loader(dataset, 4) as loader:
        next(loader)
        assert prefetch_threads() == before + 1
    assert prefetch_threads() == before
    forgotten = Loader(dataset, 4)
    next(forgotten)
    del forgotten
    gc.collect()
    assert prefetch_threads() == before


def test_errors_of_the_prefetch_thread_are_raised_to_the_consumer(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcdefgh" * 2000], sequence_length=16)
    path = dataset.folder / "tokens-train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    loader = Loader(TokenDataset.open(dataset.folder), 4)
    with pytest.raises(DataError, match="block 0"):
        next(loader)
    with pytest.raises(DataError, match="block 0"):  # and again, instead of hanging
        next(loader)


def test_waiting_is_measured(dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = TokenDataset.batch

    def sleepy(self: TokenDataset, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        return slow(self, split, rows)

    monkeypatch.setattr(TokenDataset, "batch", sleepy)
    with Loader(dataset, 4) as loader:
        next(loader)
        assert loader.waited >= 0.04
        time.sleep(0.4)  # the thread works ahead meanwhile
        before = loader.waited
        next(loader)
        assert loader.waited - before < 0.03


def test_the_fault_point_names_the_step(dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=2")
    with Loader(dataset, 4) as loader:
        next(loader)
        next(loader)
        with pytest.raises(InjectedFault):
            next(loader)
        assert loader.state_dict()["rows_consumed"] == 8


@pytest.mark.parametrize(("rows", "world"), [(8, 1), (8, 2), (5, 1), (64, 4), (37, 1)])
def test_evaluation_covers_every_row_once(dataset: TokenDataset, rows: int, world: int) -> None:
    seen: list[int] = []
    labels = 0
    for batches in zip(
        *(evaluation_batches(dataset, rows, "train", rank=rank, world=world) for rank in range(world)), strict=True
    ):
        for batch in batches:
            assert batch["input_ids"].shape == (rows // world, 8)
            real = (batch["labels"] != -100).any(dim=1)
            labels += int((batch["labels"] != -100).sum())
            ids = row_ids(dataset, batch)
            seen += [one for one, kept in zip(ids, real.tolist(), strict=True) if kept]
    assert seen == list(range(37))
    assert labels == dataset.facts("train").trained_tokens


def test_a_limited_evaluation_is_spread_evenly(dataset: TokenDataset) -> None:
    rows = evaluation_rows(dataset, "train", 10)
    assert len(np.unique(rows)) == 10
    assert rows.max() >= 33
    assert np.array_equal(rows, evaluation_rows(dataset, "train", 10))
    assert len(evaluation_rows(dataset, "train", 1000)) == 37
