"""Rows of built examples as batches, assembled from memory maps without a loop over rows.

A batch is a dict of arrays. Features of the axis "tokens" are [rows, T], padded at the end to the longest of the rows,
rounded up as `Padding` says; of the axis "target" likewise with a length of their own; of "row" [rows, *shape]. All
integers come as int64. Beside the features:

    rows            int64 [rows]      row numbers; -1 where `blank_rows` made a row untrained
    lengths         int64 [rows]      real tokens
    position_ids    int64 [rows, T]   counted from 0 in every example
    key_mask        bool [rows, T]    True for real tokens                           (rows that are one example)
    document_ids    int32 [rows, T]   which example, ascending; padding has its own  (packed rows)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.data.dataset import IGNORE
from trainwright.data.examples.example import Feature
from trainwright.data.examples.manifest import ExampleManifest
from trainwright.data.examples.storage import offsets_of, open_array, split_arrays

__all__ = ["Arrays", "Padding", "SplitRows", "blank_rows", "filler", "is_label"]

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


@dataclass
class Padding:
    """How wide batches are: as their longest row, rounded up to a multiple, or all of one width (`static`)."""

    multiple: int
    static: bool

    def width(self, longest: int, bound: int) -> int:
        """Slots of a row in a batch whose longest row has `longest`, and no row may have more than `bound`."""
        return bound if self.static else min(self.rounded(longest), bound)

    def rounded(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple


class SplitRows:
    """The rows of one split of a folder, as batches of a width that `padding` says when they are asked for."""

    def __init__(self, folder: Path, manifest: ExampleManifest, split: str, padding: Padding) -> None:
        facts = manifest.split(split)
        self.split = split
        self.rows = facts.rows
        self.packed = facts.packed
        self.features = manifest.features
        self.arrays = {
            role: open_array(folder, name, dtype, manifest.files)
            for role, (name, dtype) in split_arrays(split, manifest.features, packed=facts.packed).items()
        }
        self._sequence_length = manifest.sequence_length
        self._target_lengths = manifest.target_lengths
        self._padding = padding

    def records(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Numbers of the records that these rows are made of, in order: of packed rows several."""
        examples = self._examples(self._wanted(rows))[1]
        array = self.arrays["record.idx"]
        array.check(examples, examples + 1)
        return array.gather(examples).astype(np.int64)

    def batch(self, rows: NDArray[np.integer]) -> Arrays:
        """The rows with these numbers, in this order. Raises IndexError outside [0, rows)."""
        wanted = self._wanted(rows)
        place, examples = self._examples(wanted)
        offsets: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for name in {offsets_of(feature) for feature in self.features} - {None}:
            array = self.arrays[f"{name}.idx"]
            array.check(examples, examples + 2)
            start = array.gather(examples).astype(np.int64)
            offsets[str(name)] = start, array.gather(examples + 1).astype(np.int64) - start
        counts = offsets["tokens"][1]
        lengths = np.bincount(place, weights=counts, minlength=wanted.size).astype(np.int64)
        width = self._padding.width(int(lengths.max(initial=1)), self._sequence_length)
        in_row = np.cumsum(counts) - counts  # slot of each example within its row
        in_row -= in_row[np.searchsorted(place, np.arange(wanted.size))][place] if place.size else 0
        out: Arrays = {}
        for feature in self.features:
            if (name := offsets_of(feature)) is None:
                out[feature.name] = self._gather_rows(feature, examples)
                continue
            start, count = offsets[name]
            if feature.axis == "tokens":
                out[feature.name] = self._fill(feature, start, count, place * width + in_row, wanted.size, width)
            else:
                bound = self._padding.rounded(max(1, self._target_lengths[feature.name]))
                wide = self._padding.width(int(count.max(initial=1)), bound)
                out[feature.name] = self._fill(feature, start, count, place * wide, wanted.size, wide)
        out.update(self._places(place, counts, in_row, lengths, width))
        out["lengths"] = lengths
        out["rows"] = wanted
        if "decoder_input_ids" in out:
            known = offsets["decoder_input_ids"][1] if "decoder_input_ids" in offsets else counts
            out["decoder_key_mask"] = np.arange(out["decoder_input_ids"].shape[1]) < known[:, None]
        return out

    def _wanted(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        wanted = np.array(rows, dtype=np.int64)
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= self.rows):
            raise IndexError(f"row outside [0, {self.rows}) of split {self.split!r}")
        return wanted

    def _examples(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The examples of the rows, in order: place in the batch, and number. Both int64 [examples]."""
        if not self.packed:
            return np.arange(rows.size, dtype=np.int64), rows
        arrays = self.arrays
        arrays["rows.idx"].check(rows, rows + 2)
        begin = arrays["rows.idx"].gather(rows).astype(np.int64)
        end = arrays["rows.idx"].gather(rows + 1).astype(np.int64)
        arrays["rows.example"].check(begin, end)
        place, index = _expand(begin, end - begin)
        return place, arrays["rows.example"].gather(index).astype(np.int64)

    def _fill(
        self,
        feature: Feature,
        start: NDArray[np.int64],
        count: NDArray[np.int64],
        slot: NDArray[np.int64],
        rows: int,
        width: int,
    ) -> NDArray[Any]:
        """Stretches [start, start + count) of a flat feature written to the slots from `slot` on: [rows, width]."""
        array = self.arrays[feature.name]
        array.check(start, start + count)
        piece, source = _expand(start, count)
        out = np.full(rows * width, filler(feature), dtype=_dtype(feature))
        out[slot[piece] + source - start[piece]] = array.gather(source)
        return out.reshape(rows, width)

    def _gather_rows(self, feature: Feature, examples: NDArray[np.int64]) -> NDArray[Any]:
        size = int(np.prod(feature.shape, dtype=np.int64))
        array = self.arrays[feature.name]
        array.check(examples * size, (examples + 1) * size)
        index = examples[:, None] * size + np.arange(size)
        return array.gather(index).astype(_dtype(feature)).reshape(len(examples), *feature.shape)

    def _places(
        self,
        place: NDArray[np.int64],
        counts: NDArray[np.int64],
        in_row: NDArray[np.int64],
        lengths: NDArray[np.int64],
        width: int,
    ) -> Arrays:
        """Positions, and what keeps examples and padding apart."""
        batch = lengths.size
        slots = np.arange(width, dtype=np.int64)
        if not self.packed:
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
