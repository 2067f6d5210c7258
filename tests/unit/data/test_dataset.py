from __future__ import annotations

import collections
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tiny_datasets import ALPHABET, build

from trainwright.base.errors import DataError
from trainwright.data.dataset import IGNORE, TokenDataset
from trainwright.data.tokenizers import load_tokenizer


def texts_of(seed: int, count: int, longest: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def test_concat_rows_are_the_stream(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcdefgh", "ijklmn"], sequence_length=4)
    tokens = dataset.tokens("train")
    batch = dataset.batch("train", np.arange(dataset.rows("train")))
    assert batch["input_ids"].shape == (4, 4)
    assert np.array_equal(batch["input_ids"].ravel()[:13], tokens[:13])
    assert np.array_equal(batch["labels"].ravel()[:13], tokens[1:14])
    assert (batch["labels"][-1, 1:] == IGNORE).all()
    assert (batch["position_ids"] == np.arange(4)).all()
    assert "document_ids" not in batch
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == np.int64


def test_concat_with_a_mask_restarts_at_documents(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcde", "fg", "hijk"], sequence_length=4, document_mask=True)
    # stream a b c d e f g h i j k: rows abcd, efgh, ijk-
    batch = dataset.batch("train", np.arange(3))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 0], [0, 1, 0, 1]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 1, 1]]
    text = "abcdefghijk"
    trained = [[text[1:5]], [text[6], text[8]], [text[9:11]]]  # no label begins a document: f and h are missing
    decode = load_tokenizer(str(dataset.tokenizer_folder)).decode
    for row, expected in zip(batch["labels"], trained, strict=True):
        assert decode(row[row != IGNORE]) == "".join(expected)
    assert batch["document_ids"].dtype == np.int32


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize("eos", [False, True])
def test_rows_hold_every_transition_once_and_nothing_else(tmp_path: Path, packing: str, mask: bool, eos: bool) -> None:
    """Against a plain rebuild from the documents: pairs, positions, document ids, padding and the manifest's counts."""
    texts = texts_of(1, 40, 30)
    dataset = build(tmp_path, texts, packing=packing, document_mask=mask, append_eos=eos, sequence_length=8)
    tokenizer = load_tokenizer(str(dataset.tokenizer_folder))
    documents = [tokenizer.encode(text) + [tokenizer.eos_id] * eos for text in texts]
    batch = dataset.batch("train", np.arange(dataset.rows("train")))
    inputs, labels = batch["input_ids"], batch["labels"]
    trained = labels != IGNORE
    pairs = collections.Counter(zip(inputs[trained].tolist(), labels[trained].tolist(), strict=True))
    if packing == "concat" and not mask:
        stream = [token for document in documents for token in document]
        assert pairs == collections.Counter(itertools.pairwise(stream))
    else:
        assert pairs == collections.Counter(pair for document in documents for pair in itertools.pairwise(document))
    facts = dataset.facts("train")
    assert facts.trained_tokens == int(trained.sum())
    assert facts.tokens == sum(map(len, documents))
    assert ("document_ids" in batch) == (mask and packing != "pad")
    for row in range(len(inputs)):
        check_row(batch, row, documents, masked=mask, shared="document_ids" in batch)


def check_row(
    batch: dict[str, np.ndarray], row: int, documents: list[list[int]], *, masked: bool, shared: bool
) -> None:
    inputs, labels, positions = (batch[name][row].tolist() for name in ("input_ids", "labels", "position_ids"))
    length = len(inputs)
    # wherever the next slot continues the same document, the label is the next input
    ids = batch["document_ids"][row].tolist() if shared else [0] * length
    for slot in range(length - 1):
        if labels[slot] != IGNORE and ids[slot] == ids[slot + 1] and masked and labels[slot + 1] != IGNORE:
            assert labels[slot] == inputs[slot + 1]
    if shared:
        assert ids == sorted(ids)
        for slot in range(length):
            starts = slot == 0 or ids[slot] != ids[slot - 1]
            assert positions[slot] == (0 if starts else positions[slot - 1] + 1)
        for one in set(ids):  # the tokens of one id stand together in one document
            mine = [inputs[slot] for slot in range(length) if ids[slot] == one and labels[slot] != IGNORE]
            text = ",".join(map(str, mine))
            assert not mine or any(text in ",".join(map(str, document)) for document in documents)
    elif not masked:
        assert positions == list(range(length))


def test_best_fit_rows_without_a_mask_keep_the_separator(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abc", "def"], packing="best_fit", document_mask=False, append_eos=True)
    row = dataset.row("train", 0)
    eos = dataset.manifest.eos_id
    assert row["input_ids"].tolist().count(eos) == 2
    assert (row["labels"][row["input_ids"] == eos] == IGNORE).all()


def test_padding_has_its_own_document(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcd", "ef"], packing="best_fit", sequence_length=8)
    row = dataset.row("train", 0)
    assert row["document_ids"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert row["labels"].tolist()[4:] == [IGNORE] * 4
    assert row["input_ids"].tolist()[4:] == [dataset.manifest.pad_id] * 4
    assert dataset.facts("train").padding_share(8) == 0.5


def test_any_row_alone_equals_the_row_in_a_batch(tmp_path: Path) -> None:
    for packing in ("concat", "best_fit", "pad"):
        dataset = build(tmp_path / packing, texts_of(2, 60, 40), packing=packing, document_mask=True)
        count = dataset.rows("train")
        order = np.random.default_rng(0).permutation(count)
        batch = dataset.batch("train", order)
        for place in (0, 1, count // 2, count - 1):
            for name, array in dataset.row("train", int(order[place])).items():
                assert np.array_equal(array, batch[name][place]), (packing, name)
        with pytest.raises(IndexError):
            dataset.row("train", count)
        with pytest.raises(DataError, match="no split 'validation'"):
            dataset.row("validation", 0)


def data_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]


def test_a_flipped_bit_anywhere_is_named(tmp_path: Path) -> None:
    dataset = build(tmp_path, texts_of(3, 50, 20), packing="best_fit")
    everything = np.arange(dataset.rows("train"))
    for path in data_files(dataset.folder):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        if not path.name.startswith("docs-"):  # masked best_fit rows need no document offsets
            with pytest.raises(DataError) as caught:
                TokenDataset.open(dataset.folder).batch("train", everything)
            assert str(path) in str(caught.value)
        with pytest.raises(DataError) as caught:
            TokenDataset.open(dataset.folder, verify="hashes")
        assert str(path) in str(caught.value)
        path.write_bytes(original)
    TokenDataset.open(dataset.folder, verify="hashes")


def test_a_flipped_bit_is_found_when_its_block_is_read_and_not_before(tmp_path: Path) -> None:
    texts = ["abcdefgh" * 10_000 for _ in range(20)]  # 3 MiB of tokens: four blocks
    dataset = build(tmp_path, texts, sequence_length=64)
    path = dataset.folder / "tokens-train.bin"
    content = bytearray(path.read_bytes())
    content[(2 << 20) + 17] ^= 1
    path.write_bytes(content)
    again = TokenDataset.open(dataset.folder)
    again.row("train", 0)
    with pytest.raises(DataError, match=r"tokens-train\.bin: block 2 \(bytes 2097152 to "):
        again.row("train", ((2 << 20) // 2) // 64 + 3)
    with pytest.raises(DataError, match="block 2"):
        TokenDataset.open(dataset.folder, verify="hashes")


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    dataset = build(tmp_path, texts_of(4, 50, 20), packing="best_fit")
    for path in data_files(dataset.folder):
        original = path.read_bytes()
        path.write_bytes(original[:-1])
        with pytest.raises(DataError) as caught:
            TokenDataset.open(dataset.folder)
        assert str(path) in str(caught.value)
        path.unlink()
        with pytest.raises(DataError) as caught:
            TokenDataset.open(dataset.folder)
        assert str(path) in str(caught.value)
        path.write_bytes(original)


def test_a_bad_manifest_is_refused(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcdefghijkl"])
    path = dataset.folder / "manifest.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    wrong_files = {**good["files"], "../evil": good["files"]["tokens-train.bin"]}
    for change, message in (
        ({"schema": 99}, "schema 99"),
        ({"kind": "something"}, "not the manifest"),
        ({"splits": {"train": {}}}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"files": {}}, "does not list"),
        ({"files": wrong_files}, "outside the folder"),
    ):
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            TokenDataset.open(dataset.folder)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(DataError, match="not a built dataset"):
        TokenDataset.open(dataset.folder)


def test_the_fingerprint_names_the_rows_and_not_the_place(tmp_path: Path) -> None:
    texts = texts_of(5, 20, 20)
    one = build(tmp_path / "one", texts, packing="best_fit")
    same = build(tmp_path / "two", texts, packing="best_fit")
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != build(tmp_path / "three", texts, packing="pad").fingerprint
    assert one.fingerprint != build(tmp_path / "four", [*texts, "x"], packing="best_fit").fingerprint
