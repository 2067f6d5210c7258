"""A built dataset: opens in milliseconds whatever its size, and gives any row, alone or in batches, from memory maps.

A batch is a dict of arrays [rows, T]: `input_ids` and `labels` int64 (labels already shifted; -100 is not trained),
`position_ids` int64, and, when documents are masked and a row can hold more than one, `document_ids` int32 (ascending;
padding has an id of its own).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.manifest import Manifest, SplitFacts, read_manifest
from trainwright.data.mixture import RowGroup
from trainwright.data.storage import BlockArray, hash_file

__all__ = ["IGNORE", "TokenDataset", "split_files"]

IGNORE = -100
"""The label of a slot that is not trained: what torch's cross-entropy ignores by default."""

Arrays = dict[str, NDArray[Any]]


def split_files(split: str, *, packed: bool) -> dict[str, tuple[str, str]]:
    """The files of a split: role to (file name, dtype); the dtype of tokens stands in the manifest."""
    files = {"tokens": (f"tokens-{split}.bin", ""), "documents": (f"docs-{split}.idx", "uint64")}
    if packed:
        files["row_offsets"] = (f"rows-{split}.idx", "uint64")
        files["piece_start"] = (f"pieces-{split}.start", "uint64")
        files["piece_inputs"] = (f"pieces-{split}.inputs", "uint32")
    return files


class TokenDataset:
    """The rows of a dataset folder. Use `TokenDataset.open`.

    Blocks of the files are checked against the manifest's hashes the first time a row needs them, so a damaged file
    raises DataError (file and block named) instead of being trained on.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.sequence_length = manifest.sequence_length
        self.vocab_size = manifest.vocab_size
        self._arrays: dict[str, dict[str, BlockArray]] = {}
        for split in manifest.splits:
            self._arrays[split] = {
                role: BlockArray(folder / name, dtype or manifest.token_dtype, _facts(folder, manifest, name))
                for role, (name, dtype) in split_files(split, packed=manifest.packing != "concat").items()
            }

    @classmethod
    def open(cls, folder: str | Path, verify: Literal["sizes", "hashes"] = "sizes") -> TokenDataset:
        """Open a folder that `data build` wrote. `verify="hashes"` reads every file now instead of as rows need it."""
        path = Path(folder)
        dataset = cls(path, read_manifest(path))
        for name, facts in dataset.manifest.files.items():
            if not re.fullmatch(r"(tokenizer/)?[\w.\-]+", name):
                raise DataError(f"{path}: the manifest names a file outside the folder: {name!r}")
            if name.startswith("tokenizer/") and (not (path / name).is_file() or hash_file(path / name) != facts):
                raise DataError(f"{path / name} is missing or damaged", hint="delete the folder and build it again")
        if verify == "hashes":
            for arrays in dataset._arrays.values():
                for array in arrays.values():
                    array.check_all()
        return dataset

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of these tokens lies: tokenizer.json and its companions."""
        return self.folder / "tokenizer"

    @property
    def has_document_ids(self) -> bool:
        """True when batches carry document_ids."""
        return self.manifest.document_mask and self.manifest.packing != "pad"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest.splits)

    def facts(self, split: str) -> SplitFacts:
        return self.manifest.split(split)

    def rows(self, split: str = "train") -> int:
        """Rows of one epoch of a split."""
        return self.manifest.split(split).rows

    def groups(self, split: str = "train") -> tuple[RowGroup, ...]:
        """The sources of a split that are drawn separately."""
        return self.manifest.split(split).groups

    def tokens(self, split: str = "train") -> NDArray[Any]:
        """The whole token stream of a split, a read-only memory map; checks all its blocks."""
        self.manifest.split(split)
        array = self._arrays[split]["tokens"]
        return array.read(0, len(array))

    def document_offsets(self, split: str = "train") -> NDArray[Any]:
        """Where each document starts in the token stream, and where the last one ends: uint64 [documents + 1]."""
        self.manifest.split(split)
        array = self._arrays[split]["documents"]
        return array.read(0, len(array))

    def row(self, split: str, index: int) -> Arrays:
        """One row: the arrays of a batch without the first dimension."""
        return {name: array[0] for name, array in self.batch(split, np.asarray([index])).items()}

    def batch(self, split: str, rows: NDArray[np.integer]) -> Arrays:
        """The rows with these numbers, in this order. Raises IndexError outside [0, rows(split))."""
        wanted = np.asarray(rows, dtype=np.int64)
        count = self.rows(split)
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= count):
            raise IndexError(f"row outside [0, {count}) of split {split!r}")
        place, start, inputs = self._pieces(split, wanted)
        return self._assemble(split, wanted.size, place, start, inputs)

    def lengths(self, split: str = "train") -> NDArray[np.int64]:
        """Slots of every row, all alike: int64 [rows]."""
        return np.full(self.rows(split), self.sequence_length, dtype=np.int64)

    def blank(self, batch: Arrays, first: int) -> None:
        """Make the rows of a batch from `first` on untrained, in place."""
        batch["labels"][first:] = IGNORE

    def _pieces(
        self, split: str, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The pieces of the rows, in order: place in the batch, first token, number of inputs. All int64 [pieces]."""
        if self.manifest.packing != "concat":
            arrays = self._arrays[split]
            arrays["row_offsets"].check(rows, rows + 2)
            begin = arrays["row_offsets"].gather(rows).astype(np.int64)
            end = arrays["row_offsets"].gather(rows + 1).astype(np.int64)
            place, index = _expand(begin, end - begin)
            arrays["piece_start"].check(begin, end)
            arrays["piece_inputs"].check(begin, end)
            start = arrays["piece_start"].gather(index).astype(np.int64)
            return place, start, arrays["piece_inputs"].gather(index).astype(np.int64)
        start, inputs = self._concat_stretches(split, rows)
        if not self.manifest.document_mask:
            return np.arange(rows.size, dtype=np.int64), start, inputs
        return self._cut_at_documents(split, start, inputs)

    def _concat_stretches(self, split: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        facts = self.manifest.split(split)
        first_row = np.asarray([group.first_row for group in facts.groups], dtype=np.int64)
        group_end = np.cumsum(np.asarray(facts.group_tokens, dtype=np.int64))
        # the last group that starts at or before the row: groups without rows share their first_row with the next one
        group = np.searchsorted(first_row, rows, side="right") - 1
        offset = (rows - first_row[group]) * self.sequence_length
        start = group_end[group] - np.asarray(facts.group_tokens, dtype=np.int64)[group] + offset
        return start, np.minimum(self.sequence_length, group_end[group] - 1 - start)

    def _cut_at_documents(
        self, split: str, start: NDArray[np.int64], inputs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Stretches of the stream cut where a document begins inside them."""
        offsets = self.document_offsets(split)
        first = np.searchsorted(offsets, start.astype(np.uint64), side="right")
        last = np.searchsorted(offsets, (start + inputs).astype(np.uint64), side="left")
        place, index = _expand(first, last - first)
        inner = offsets[index].astype(np.int64)
        places = np.concatenate([np.arange(start.size, dtype=np.int64), place])
        starts = np.concatenate([start, inner])
        # empty documents repeat an offset: one cut is enough
        cuts = np.unique(np.stack([places, starts], axis=1), axis=0)
        place, begin = cuts[:, 0], cuts[:, 1]
        end = np.append(begin[1:], 0)
        closing = np.append(place[1:] != place[:-1], True)
        end[closing] = (start + inputs)[place[closing]]
        return place, begin, end - begin

    def _assemble(
        self, split: str, batch: int, place: NDArray[np.int64], start: NDArray[np.int64], inputs: NDArray[np.int64]
    ) -> Arrays:
        length = self.sequence_length
        tokens = self._arrays[split]["tokens"]
        tokens.check(start, np.minimum(start + inputs + 1, len(tokens)))
        first_piece = np.searchsorted(place, np.arange(batch))
        before = np.cumsum(inputs) - inputs
        in_row = before - before[first_piece[place]] if place.size else before  # slot of the piece within its row
        piece, source = _expand(start, inputs)
        within = source - start[piece]
        slot = (place * length + in_row)[piece] + within

        input_ids = np.full(batch * length, self.manifest.pad_id, dtype=np.int64)
        labels = np.full(batch * length, IGNORE, dtype=np.int64)
        input_ids[slot] = tokens.gather(source)
        labels[slot] = tokens.gather(np.minimum(source + 1, len(tokens) - 1))
        labels[slot[np.cumsum(inputs)[self._ends_document(split, start + inputs)] - 1]] = IGNORE
        arrays: Arrays = {"input_ids": input_ids, "labels": labels}

        positions = np.tile(np.arange(length, dtype=np.int64), batch)
        if self.manifest.document_mask:
            used = np.bincount(place, weights=inputs, minlength=batch).astype(np.int64)
            positions = np.maximum(positions - np.repeat(used, length), 0)  # padding counts from 0 too
            positions[slot] = within
        arrays["position_ids"] = positions
        if self.has_document_ids:
            pieces = np.bincount(place, minlength=batch)
            ids = np.repeat(pieces, length).astype(np.int32)
            ids[slot] = (np.arange(place.size) - first_piece[place])[piece]
            arrays["document_ids"] = ids
        return {name: array.reshape(batch, length) for name, array in arrays.items()}

    def _ends_document(self, split: str, end: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pieces end where their document ends, so that the next token belongs to another one."""
        masked, concat = self.manifest.document_mask, self.manifest.packing == "concat"
        if masked != concat:  # packed and masked: pieces never reach their last token; one stream: labels may cross
            return np.zeros(end.size, dtype=bool)
        offsets = self.document_offsets(split)
        return offsets[np.searchsorted(offsets, end.astype(np.uint64))].astype(np.int64) == end


def _expand(start: NDArray[np.integer], counts: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stretches [start, start + count) written out: the stretch each item comes from, and the item."""
    counts = counts.astype(np.int64)
    owner = np.repeat(np.arange(counts.size, dtype=np.int64), counts)
    before = np.cumsum(counts) - counts
    return owner, np.arange(owner.size, dtype=np.int64) + (start.astype(np.int64) - before)[owner]


def _facts(folder: Path, manifest: Manifest, name: str) -> Any:
    if name not in manifest.files:
        raise DataError(f"{folder}: the manifest does not list {name}", hint="delete the folder and build it again")
    return manifest.files[name]
