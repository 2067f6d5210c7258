"""Batches of examples: what a naive collate gives, isolation in packed rows, labels that are not trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_examples import PairEncoder, Tiny, build, pairs

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.examples.batches import filler, is_label
from trainwright.data.examples.checks import padding_share
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.example import IGNORE, Encoded, Example, Piece

LENGTHS = [5, 9, 31, 12, 4, 32, 7, 7, 18, 26, 3, 11]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> ExampleDataset:
    return build(tmp_path_factory.mktemp("padded"), pairs(LENGTHS))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ExampleDataset:
    return build(tmp_path_factory.mktemp("packed"), pairs(LENGTHS), packing="best_fit")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> ExampleDataset:
    records = [{"text": "你好吗"[: 1 + i % 3] + "x" * i, "label": f"k{i % 3}", "out": (7 * i) % 11} for i in range(20)]
    return build(tmp_path_factory.mktemp("labelled"), records, Tiny("label"))


def encoded(dataset: ExampleDataset, split: str = "train") -> list[Example]:
    """The examples as the encoder makes them now, from the stored records."""
    definition = Tiny("pair" if dataset.manifest.shape == "pair" else "label")
    encoder = definition.bind(dataset.survey, dataset.tokenizer()).encoder
    return [example for record in dataset.records_of(split) for example in encoder.encode(record).examples]


def naive(dataset: ExampleDataset, examples: list[Example], multiple: int) -> dict[str, np.ndarray]:
    """A collate that does one example after the other."""

    def up(size: int) -> int:
        return -(-size // multiple) * multiple

    out: dict[str, Any] = {}
    longest = max(example.length for example in examples)
    width = min(up(longest), dataset.sequence_length)
    for feature in dataset.features:
        arrays = [np.asarray(example.arrays[feature.name]) for example in examples]
        kind = np.float32 if feature.dtype == "float32" else np.int64
        if feature.axis == "row":
            out[feature.name] = np.stack([array.astype(kind) for array in arrays])
            continue
        size = width if feature.axis == "tokens" else up(max(1, *(len(array) for array in arrays), 0))
        rows = []
        for array in arrays:
            row = np.full(size, filler(feature), dtype=kind)
            row[: len(array)] = array
            rows.append(row)
        out[feature.name] = np.stack(rows)
    out["lengths"] = np.asarray([example.length for example in examples])
    out["key_mask"] = np.asarray([[slot < example.length for slot in range(width)] for example in examples])
    out["position_ids"] = np.asarray([list(range(width))] * len(examples))
    return out


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, 11), min_size=1, max_size=14), multiple=st.sampled_from([1, 3, 8, 64]))
def test_batches_equal_a_naive_collate(padded: ExampleDataset, rows: list[int], multiple: int) -> None:
    dataset = ExampleDataset.open(padded.folder, pad_multiple=multiple)
    examples = encoded(dataset)
    batch = dataset.batch("train", np.asarray(rows))
    expected = naive(dataset, [examples[row] for row in rows], multiple)
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array, err_msg=name)
        assert batch[name].dtype == array.dtype
    np.testing.assert_array_equal(batch["rows"], rows)
    assert set(batch) == {*expected, "rows"}


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.integers(0, 19), min_size=1, max_size=9), multiple=st.sampled_from([1, 8]))
def test_features_of_every_axis_equal_a_naive_collate(labelled: ExampleDataset, rows: list[int], multiple: int) -> None:
    dataset = ExampleDataset.open(labelled.folder, pad_multiple=multiple)
    examples = encoded(dataset)
    batch = dataset.batch("train", np.asarray(rows))
    for name, array in naive(dataset, [examples[row] for row in rows], multiple).items():
        np.testing.assert_array_equal(batch[name], array, err_msg=name)
    real = [len(examples[row].arrays["decoder_input_ids"]) for row in rows]
    assert batch["decoder_key_mask"].sum(axis=1).tolist() == real
    assert batch["box"].shape == (len(rows), 2, 2)


def test_static_batches_have_one_shape(padded: ExampleDataset, labelled: ExampleDataset) -> None:
    dataset = ExampleDataset.open(padded.folder, static=True)
    for rows in ([0], [4, 10], list(range(12))):
        batch = dataset.batch("train", np.asarray(rows))
        assert batch["input_ids"].shape == (len(rows), 32)
        assert batch["key_mask"].sum(axis=1).tolist() == batch["lengths"].tolist()
    targets = ExampleDataset.open(labelled.folder, static=True)
    shapes = {targets.batch("train", np.asarray([row]))["decoder_input_ids"].shape for row in range(20)}
    assert shapes == {(1, 16)}  # the longest has 10, rounded up to a multiple of 8


def test_integers_and_numbers_that_are_not_trained(tmp_path: Path, padded: ExampleDataset) -> None:
    batch = padded.batch("train", np.asarray([0, 1, 2]))
    before = {name: array.copy() for name, array in batch.items()}
    padded.blank(batch, 1)
    assert (batch["labels"][1:] == IGNORE).all()
    assert batch["rows"].tolist() == [0, -1, -1]
    for name, array in before.items():
        np.testing.assert_array_equal(batch[name][:1], array[:1])
        if not is_label(name) and name != "rows":
            np.testing.assert_array_equal(batch[name], array)
    numbers = build(
        tmp_path,
        [{"text": "ab", "label": 0.5}, {"text": "abc", "label": -1.25}, {"text": "a", "label": float(3)}],
        Tiny("label", options={"numbers": True}),
    )
    batch = numbers.batch("train", np.arange(3))
    assert batch["labels"].dtype == np.float32
    assert batch["labels"].tolist() == [0.5, -1.25, 3.0]
    numbers.blank(batch, 2)
    assert np.isnan(batch["labels"]).tolist() == [False, False, True]
    assert numbers.facts("train").trained_tokens == 3


def test_packed_rows_hold_whole_examples_apart(packed: ExampleDataset) -> None:
    examples = encoded(packed)
    rows = packed.rows("train")
    assert rows == -(-sum(LENGTHS) // 32)  # these lengths fill their rows well
    batch = packed.batch("train", np.arange(rows))
    assert "key_mask" not in batch
    assert batch["document_ids"].dtype == np.int32
    seen = []
    for row in range(rows):
        ids = batch["document_ids"][row]
        assert (np.diff(ids) >= 0).all()
        used = int(batch["lengths"][row])
        for document in range(int(ids.max()) + 1):
            slots = np.flatnonzero(ids == document)
            assert (np.diff(slots) == 1).all()
            assert batch["position_ids"][row][slots].tolist() == list(range(len(slots)))
            if slots[0] >= used:  # padding is a document of its own, and not trained
                assert (batch["labels"][row][slots] == IGNORE).all()
                continue
            seen.append({name: batch[name][row][slots].tolist() for name in ("input_ids", "labels", "weights")})
    expected = [{name: example.arrays[name].tolist() for name in seen[0]} for example in examples]
    key = str
    assert sorted(map(key, seen)) == sorted(map(key, expected))
    assert int((batch["labels"] != IGNORE).sum()) == packed.facts("train").trained_tokens
    records = [record["source"] for row in range(rows) for record in packed.records("train", [row])]
    assert sorted(records) == sorted(record["source"] for record in packed.records_of("train"))


def test_no_label_of_a_packed_row_reaches_into_the_next_example(packed: ExampleDataset) -> None:
    """Labels are those of the example alone: also the last one of each, which has another example's token behind it."""
    batch = packed.batch("train", np.arange(packed.rows("train")))
    ids, labels = batch["document_ids"], batch["labels"]
    last = np.concatenate([ids[:, 1:] != ids[:, :-1], np.ones((len(ids), 1), dtype=bool)], axis=1)
    assert last.sum() > packed.rows("train")
    assert (labels[last] == IGNORE).sum() >= last.sum() - 1  # one example was cut and has no end of its own
    inner = ~last & (labels != IGNORE)
    np.testing.assert_array_equal(labels[:, :-1][inner[:, :-1]], batch["input_ids"][:, 1:][inner[:, :-1]])


def test_packing_is_deterministic_and_padding_is_less(tmp_path: Path, packed: ExampleDataset) -> None:
    again = build(tmp_path, pairs(LENGTHS), packing="best_fit")
    assert again.fingerprint == packed.fingerprint
    assert packed.facts("train").padding_share(32) < 0.15
    assert packed.lengths("train").sum() == sum(LENGTHS)


def test_only_training_rows_are_packed(tmp_path: Path) -> None:
    from trainwright.data.spec import ValidationSpec

    dataset = build(tmp_path, pairs(LENGTHS * 3), packing="best_fit", validation=ValidationSpec(fraction=0.3))
    record, pieces = dataset.examples_of("validation")
    assert record.tolist() == list(range(dataset.rows("validation")))
    assert list(pieces) == [Piece()] * len(record)
    assert "key_mask" in dataset.batch("validation", np.arange(2))
    with pytest.raises(DataError, match="packed"):
        dataset.examples_of("train")


class RowFeature(PairEncoder):
    features = (*PairEncoder.features, PairEncoder.features[1].__class__("start", "int32", "row"))


@pytest.mark.parametrize("kind", ["label", "unpackable"])
def test_what_belongs_to_a_whole_example_cannot_be_packed(tmp_path: Path, kind: str) -> None:
    if kind == "label":
        records, definition = [{"text": "ab", "label": "a"}], Tiny("label", options={"packable": True})
        match = "labels, decoder_input_ids, box belong to a whole example"
    else:
        records, definition = pairs([5, 6]), Tiny(options={"packable": False})
        match = "tiny-pair cannot share rows"
    with pytest.raises(ConfigError, match=match):
        build(tmp_path, records, definition, packing="best_fit")


def test_pieces_of_long_records(tmp_path: Path) -> None:
    dataset = build(tmp_path, pairs([30, 6, 20]), Tiny(max_length=8, options={"stride": 4}), sequence_length=8)
    record, pieces = dataset.examples_of("train")
    assert record.tolist() == [0] * 8 + [1] * 2 + [2] * 5
    assert pieces[1] == Piece(1, 8, {"start": 4})
    assert pieces[-1] == Piece(4, 5, {"start": 16})
    assert [one["source"] for one in dataset.records("train", [7, 8])] == [
        dataset.records_of("train")[n]["source"] for n in (0, 1)
    ]


def test_rows_outside_are_refused(padded: ExampleDataset) -> None:
    for rows in ([12], [-1]):
        with pytest.raises(IndexError, match=r"outside \[0, 12\)"):
            padded.batch("train", np.asarray(rows))
    with pytest.raises(DataError, match=r"no split 'test'(.|\n)*data.test"):
        padded.rows("test")


def test_the_share_of_padding_is_that_of_the_batches(padded: ExampleDataset) -> None:
    from trainwright.data.loader import Loader

    real = slots = 0
    loader = Loader(padded, 3, seed=5, prefetch=0)
    for step in range(4):
        batch = loader.batch(step)
        real += int(batch["lengths"].sum())
        slots += batch["input_ids"].numel()
    assert padding_share(padded, 3, seed=5) == pytest.approx(1 - real / slots)


def test_big_batches_are_quick(tmp_path: Path) -> None:
    """Thousands of rows in about 10 ms: nothing in it goes row by row. The bound is fifty times that."""
    dataset = build(tmp_path, pairs([4 + n % 28 for n in range(4000)]))
    rows = np.arange(4000)
    dataset.batch("train", rows)
    began = time.perf_counter()
    dataset.batch("train", rows)
    assert time.perf_counter() - began < 0.5


def test_encoded_arrays_must_be_what_the_features_say(tmp_path: Path) -> None:
    class Wrong(PairEncoder):
        def encode(self, record: Any) -> Encoded:
            good = super().encode(record).examples[0].arrays
            return Encoded((Example({**good, "weights": good["weights"][:-1]}),))

    class Definition(Tiny):
        def bind(self, survey: Any, tokenizer: Any) -> Any:
            from tiny_examples import Bound

            return Bound(Wrong(tokenizer, 32))

    with pytest.raises(ValueError, match="weights has the shape"):
        build(tmp_path, pairs([8]), Definition())
