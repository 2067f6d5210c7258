"""Built examples: a folder that opens at once and gives any rows as a batch, with the records they come from."""

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
from trainwright.data.examples.batches import Arrays, Padding, SplitRows, blank_rows
from trainwright.data.examples.example import Piece
from trainwright.data.examples.manifest import ExampleFacts, ExampleManifest, read_example_manifest
from trainwright.data.examples.storage import Lines, flat, read_piece, record_of
from trainwright.data.mixture import RowGroup
from trainwright.data.storage import hash_file

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["ExampleDataset"]


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
        self.padding = Padding(pad_multiple, static)
        self._splits = {split: SplitRows(folder, manifest, split, self.padding) for split in manifest.splits}

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
            for split in dataset._splits.values():
                for array in split.arrays.values():
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
        arrays = self._split(split).arrays
        ends = flat(arrays["tokens.idx"]).astype(np.int64)
        each = ends[1:] - ends[:-1]
        if not self.facts(split).packed:
            return each
        before = np.concatenate([[0], np.cumsum(each[flat(arrays["rows.example"]).astype(np.int64)])])
        bounds = before[flat(arrays["rows.idx"]).astype(np.int64)]
        return bounds[1:] - bounds[:-1]

    def count_labels(self, split: str, label: int) -> int:
        """How many labels of a split are this one."""
        return int((flat(self._split(split).arrays["labels"]) == label).sum())

    # ---- records

    def records_of(self, split: str) -> Sequence[dict[str, Any]]:
        """All records of a split, in file order, those that gave no example included; read on demand.

        Each has its fields and "where" it came from, for people (file:line).
        """
        return self._lines(split, "records", lambda line: record_of(json.loads(line)))

    def records(self, split: str, rows: NDArray[np.integer] | Sequence[int]) -> list[dict[str, Any]]:
        """The record of each of these rows; of packed rows all their records, one behind the other."""
        records = self.records_of(split)
        return [records[number] for number in self._split(split).records(np.asarray(rows)).tolist()]

    def examples_of(self, split: str) -> tuple[NDArray[np.int64], Sequence[Piece]]:
        """For every row: the number of its record, int64 [rows], and which part of the record it is.

        Raises DataError for packed rows, which are several examples each.
        """
        if self.facts(split).packed:
            raise DataError(
                f"rows of the split {split!r} are packed: a row is several examples",
                hint="set data.packing: pad to put predictions of training rows together",
            )
        record = flat(self._split(split).arrays["record.idx"]).astype(np.int64)
        return record, self._lines(split, "pieces", read_piece)

    def _lines(self, split: str, name: str, parse: Any) -> Lines:
        arrays = self._split(split).arrays
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
        return self._split(split).batch(rows)

    def _split(self, split: str) -> SplitRows:
        self.facts(split)
        return self._splits[split]
