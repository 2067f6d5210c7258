"""Built examples: opens at once, and gives any rows as a batch, assembled from memory maps without a loop over rows.

A batch is a dict of arrays. Features of the axis "tokens" are [rows, T], padded at the end to the longest of the rows,
rounded up to `pad_multiple`; of the axis "target" likewise with a length of their own; of "row" [rows, *shape]. All
integers come as int64. Beside the features:

    rows            int64 [rows]      row numbers; -1 where `blank` made a row untrained
    lengths         int64 [rows]      real tokens
    position_ids    int64 [rows, T]   counted from 0 in every example
    key_mask        bool [rows, T]    True for real tokens                           (rows that are one example)
    document_ids    int32 [rows, T]   which example, ascending; padding has its own  (packed rows)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.dataset import IGNORE
from trainwright.data.examples.example import Feature, Piece
from trainwright.data.examples.manifest import ExampleFacts, ExampleManifest, read_example_manifest
from trainwright.data.examples.storage import Lines, flat, offsets_of, open_array, read_piece, record_of, split_arrays
from trainwright.data.mixture import RowGroup
from trainwright.data.storage import BlockArray, hash_file

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["Arrays", "ExampleDataset", "blank_rows", "filler", "is_label"]

Arrays = dict[str, NDArray[Any]]


def is_label(name: str) -> bool:
    """Whether a feature says what is trained: "labels" and "..._labels"."""
    return name == "labels" or name.endswith("_labels")


def filler(feature: Feature) -> float:
    """What fills up a feature: labels are filled with what is not trained."""
    if is_label(feature.name):
        return float("nan") if feature.dtype == "float32" else IGNORE
    return feature.pad


def blank_rows(batch: Arrays, first: int) -> None:
    """Make the rows from `first` on untrained, in place: labels -100 or NaN, row number -1."""
    for name, array in batch.items():
        if is_label(name):
            array[first:] = np.nan if array.dtype.kind == "f" else IGNORE
    if "rows" in batch:
        batch["rows"][first:] = -1


class ExampleDataset:
    """The rows of a folder of examples. Use `ExampleDataset.open`.

    Args:
        pad_multiple: batches are padded to the longest of their rows, rounded up to this, never beyond
            `sequence_length`.
        static: pad every batch to `sequence_length`.

    Blocks of the files are checked against the manifest's hashes the first time a row needs them, so a damaged file
    raises DataError (file and block named) instead of being trained on.
    """

    def __init__(self, folder: Path, manifest: ExampleManifest, *, pad_multiple: int = 8, static: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.features = manifest.features
        self.sequence_length = manifest.sequence_length
        self.vocab_size = manifest.vocab_size
        self.pad_multiple = pad_multiple
        self.static = static
        self._arrays: dict[str, dict[str, BlockArray]] = {
            split: {
                role: open_array(folder, name, dtype, manifest.files)
                for role, (name, dtype) in split_arrays(split, manifest.features, packed=facts.packed).items()
            }
            for split, facts in manifest.splits.items()
        }

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        pad_multiple: int = 8,
        static: bool = False,
        verify: Literal["sizes", "hashes"] = "sizes",
    ) -> ExampleDataset:
        """Open a folder that `build_examples` wrote. `verify="hashes"` reads every file now."""
        path = Path(folder)
        dataset = cls(path, read_example_manifest(path), pad_multiple=pad_multiple, static=static)
        for name, facts in dataset.manifest.files.items():
            if not re.fullmatch(r"(tokenizer/)?[\w.\-]+", name):
                raise DataError(f"{path}: the manifest names a file outside the folder: {name!r}")
            whole = name.startswith("tokenizer/") or name == "survey.json"
            if whole and (not (path / name).is_file() or hash_file(path / name) != facts):
                raise DataError(f"{path / name} is missing or damaged", hint="delete the folder and build it again")
        if verify == "hashes":
            for arrays in dataset._arrays.values():
                for array in arrays.values():
                    array.check_all()
        return dataset

    # ---- what it holds

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest.splits)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: tokenizer.json and its companions."""
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these examples."""
        from trainwright.data.tokenizers import load_tokenizer

        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def survey(self) -> dict[str, Any]:
        """What the task's definition said of the training records."""
        value: dict[str, Any] = json.loads((self.folder / "survey.json").read_text(encoding="utf-8"))
        return value

    @property
    def has_document_ids(self) -> bool:
        """True when training batches carry document_ids."""
        return self.manifest.splits["train"].packed

    def facts(self, split: str) -> ExampleFacts:
        return self.manifest.split(split)

    def rows(self, split: str = "train") -> int:
        """Rows of one epoch of a split."""
        return self.manifest.split(split).rows

    def groups(self, split: str = "train") -> tuple[RowGroup, ...]:
        """The sources of a split that are drawn separately."""
        return self.manifest.split(split).groups

    def lengths(self, split: str) -> NDArray[np.int64]:
        """Real tokens of every row of a split: int64 [rows]."""
        return self._lengths(split)[0]

    def count_labels(self, split: str, label: int) -> int:
        """How many labels of a split are this one."""
        return int((flat(self._arrays[split]["labels"]) == label).sum())

    def _lengths(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of every row, and of every example."""
        arrays = self._arrays[split]
        ends = flat(arrays["tokens.idx"]).astype(np.int64)
        each = ends[1:] - ends[:-1]
        if not self.facts(split).packed:
            return each, each
        before = np.concatenate([[0], np.cumsum(each[flat(arrays["rows.example"]).astype(np.int64)])])
        bounds = before[flat(arrays["rows.idx"]).astype(np.int64)]
        return bounds[1:] - bounds[:-1], each

    # ---- records

    def records_of(self, split: str) -> Sequence[dict[str, Any]]:
        """All records of a split, in file order, those that gave no example included; read on demand.

        Each has its fields and "where" it came from, for people (file:line).
        """
        return self._lines(split, "records", lambda line: record_of(json.loads(line)))

    def records(self, split: str, rows: NDArray[np.integer] | Sequence[int]) -> list[dict[str, Any]]:
        """The record of each of these rows; of packed rows all their records, one behind the other."""
        wanted = self._wanted(split, np.asarray(rows))
        examples = self._examples(split, wanted)[1]
        array = self._arrays[split]["record.idx"]
        array.check(examples, examples + 1)
        records = self.records_of(split)
        return [records[number] for number in array.gather(examples).tolist()]

    def examples_of(self, split: str) -> tuple[NDArray[np.int64], Sequence[Piece]]:
        """For every row: the number of its record, int64 [rows], and which part of the record it is.

        Raises DataError for packed rows, which are several examples each.
        """
        if self.facts(split).packed:
            raise DataError(
                f"rows of the split {split!r} are packed: a row is several examples",
                hint="set data.packing: pad to put predictions of training rows together",
            )
        record = flat(self._arrays[split]["record.idx"]).astype(np.int64)
        return record, self._lines(split, "pieces", read_piece)

    def _lines(self, split: str, name: str, parse: Any) -> Lines:
        self.facts(split)
        arrays = self._arrays[split]
        return Lines(arrays[name], arrays[f"{name}.idx"], parse)

    # ---- batches

    def row(self, split: str, index: int) -> Arrays:
        """One row: the arrays of a batch without the first dimension."""
        return {name: array[0] for name, array in self.batch(split, np.asarray([index])).items()}

    def blank(self, batch: Arrays, first: int) -> None:
        """Make the rows of a batch from `first` on untrained, in place."""
        blank_rows(batch, first)

    def batch(self, split: str, rows: NDArray[np.integer]) -> Arrays:
        """The rows with these numbers, in this order. Raises IndexError outside [0, rows(split))."""
        wanted = self._wanted(split, rows)
        place, examples = self._examples(split, wanted)
        offsets: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for name in {offsets_of(feature) for feature in self.features} - {None}:
            array = self._arrays[split][f"{name}.idx"]
            array.check(examples, examples + 2)
            start = array.gather(examples).astype(np.int64)
            offsets[str(name)] = start, array.gather(examples + 1).astype(np.int64) - start
        counts = offsets["tokens"][1]
        lengths = np.bincount(place, weights=counts, minlength=wanted.size).astype(np.int64)
        width = self._width(int(lengths.max(initial=1)), self.sequence_length)
        in_row = np.cumsum(counts) - counts  # slot of each example within its row
        in_row -= in_row[np.searchsorted(place, np.arange(wanted.size))][place] if place.size else 0
        out: Arrays = {}
        for feature in self.features:
            if (name := offsets_of(feature)) is None:
                out[feature.name] = self._gather_rows(split, feature, examples)
                continue
            start, count = offsets[name]
            if feature.axis == "tokens":
                out[feature.name] = self._fill(split, feature, start, count, place * width + in_row, wanted.size, width)
            else:
                bound = max(1, self.manifest.target_lengths[feature.name])
                wide = self._width(int(count.max(initial=1)), -(-bound // self.pad_multiple) * self.pad_multiple)
                out[feature.name] = self._fill(split, feature, start, count, place * wide, wanted.size, wide)
        out.update(self._places(split, place, counts, in_row, lengths, width))
        out["lengths"] = lengths
        out["rows"] = wanted
        if "decoder_input_ids" in out:
            known = offsets["decoder_input_ids"][1] if "decoder_input_ids" in offsets else counts
            out["decoder_key_mask"] = np.arange(out["decoder_input_ids"].shape[1]) < known[:, None]
        return out

    def _wanted(self, split: str, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.array(rows, dtype=np.int64)
        count = self.rows(split)
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= count):
            raise IndexError(f"row outside [0, {count}) of split {split!r}")
        return wanted

    def _width(self, longest: int, bound: int) -> int:
        """Slots of a padded row."""
        return bound if self.static else min(-(-longest // self.pad_multiple) * self.pad_multiple, bound)

    def _examples(self, split: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The examples of the rows, in order: place in the batch, and number. Both int64 [examples]."""
        if not self.facts(split).packed:
            return np.arange(rows.size, dtype=np.int64), rows
        arrays = self._arrays[split]
        arrays["rows.idx"].check(rows, rows + 2)
        begin = arrays["rows.idx"].gather(rows).astype(np.int64)
        end = arrays["rows.idx"].gather(rows + 1).astype(np.int64)
        arrays["rows.example"].check(begin, end)
        place, index = _expand(begin, end - begin)
        return place, arrays["rows.example"].gather(index).astype(np.int64)

    def _fill(
        self,
        split: str,
        feature: Feature,
        start: NDArray[np.int64],
        count: NDArray[np.int64],
        slot: NDArray[np.int64],
        rows: int,
        width: int,
    ) -> NDArray[Any]:
        """Stretches [start, start + count) of a flat feature written to the slots from `slot` on: [rows, width]."""
        array = self._arrays[split][feature.name]
        array.check(start, start + count)
        piece, source = _expand(start, count)
        out = np.full(rows * width, filler(feature), dtype=_dtype(feature))
        out[slot[piece] + source - start[piece]] = array.gather(source)
        return out.reshape(rows, width)

    def _gather_rows(self, split: str, feature: Feature, examples: NDArray[np.int64]) -> NDArray[Any]:
        size = int(np.prod(feature.shape, dtype=np.int64))
        array = self._arrays[split][feature.name]
        array.check(examples * size, (examples + 1) * size)
        index = examples[:, None] * size + np.arange(size)
        return array.gather(index).astype(_dtype(feature)).reshape(len(examples), *feature.shape)

    def _places(
        self,
        split: str,
        place: NDArray[np.int64],
        counts: NDArray[np.int64],
        in_row: NDArray[np.int64],
        lengths: NDArray[np.int64],
        width: int,
    ) -> Arrays:
        """Positions, and what keeps examples and padding apart."""
        batch = lengths.size
        slots = np.arange(width, dtype=np.int64)
        if not self.facts(split).packed:
            return {"position_ids": np.tile(slots, (batch, 1)), "key_mask": slots < lengths[:, None]}
        positions = np.maximum(slots - lengths[:, None], 0).ravel()  # padding counts from 0 too
        pieces = np.bincount(place, minlength=batch)
        ids = np.repeat(pieces, width).astype(np.int32)
        piece, within = _expand(np.zeros_like(counts), counts)
        slot = (place * width + in_row)[piece] + within
        positions[slot] = within
        first = np.searchsorted(place, np.arange(batch))
        ids[slot] = (np.arange(place.size) - first[place])[piece]
        return {"position_ids": positions.reshape(batch, width), "document_ids": ids.reshape(batch, width)}


def _dtype(feature: Feature) -> str:
    return "float32" if feature.dtype == "float32" else "int64"


def _expand(start: NDArray[np.integer], counts: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stretches [start, start + count) written out: the stretch each item comes from, and the item."""
    counts = counts.astype(np.int64)
    owner = np.repeat(np.arange(counts.size, dtype=np.int64), counts)
    before = np.cumsum(counts) - counts
    return owner, np.arange(owner.size, dtype=np.int64) + (start.astype(np.int64) - before)[owner]
