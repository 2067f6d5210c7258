"""Which tokens stand in which row: packing as a pure function of document lengths.

A row is T input tokens and their T labels (the next tokens). Three modes:

- `concat`: the documents form one stream; row i holds tokens [i*T, i*T + T] (one token of overlap, so that every
  transition is trained once). Nothing is padded but the end of the last row. No table is needed.
- `best_fit`: documents longer than T are cut into pieces of T first; pieces then fill rows by best-fit decreasing
  (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024), in windows of bounded size.
- `pad`: one piece per row.

A piece is (start, inputs): inputs at tokens [start, start + inputs), labels one further. With document masking a
document of L tokens offers L - 1 inputs (its last token has nothing to predict inside the document, so it takes no
room); without it L inputs, so that the separator stays visible to the documents behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODES", "PackTable", "Pieces", "best_fit", "concat_rows", "cut_documents", "pack"]

MODES = ("concat", "best_fit", "pad")

# Pieces that one best-fit-decreasing pass sees. A million keeps the pass under ~100 MB and loses at most one
# part-filled row per length class and window; bigger windows gain nothing measurable.
WINDOW = 1 << 20


@dataclass(frozen=True)
class Pieces:
    """Stretches of the token file, in file order: `start` [pieces] int64 and `inputs` [pieces] int64 (at least 1)."""

    start: NDArray[np.int64]
    inputs: NDArray[np.int64]
    split_documents: int
    """Documents that were longer than a row and were cut."""
    dropped_documents: int
    """Documents with nothing to train: fewer than two tokens."""


@dataclass(frozen=True)
class PackTable:
    """Rows of pieces: row r holds pieces [row_offsets[r], row_offsets[r + 1]), each (start, inputs)."""

    start: NDArray[np.int64]
    inputs: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    split_documents: int
    dropped_documents: int

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1


def concat_rows(tokens: int, sequence_length: int) -> int:
    """Rows of the `concat` mode for a stream of `tokens` tokens, the last one padded: ceil((tokens - 1) / T)."""
    return max(0, -(-(tokens - 1) // sequence_length))


def cut_documents(offsets: NDArray[np.integer], sequence_length: int, *, document_mask: bool) -> Pieces:
    """Cut documents into pieces of at most T inputs that together train every transition inside a document once.

    `offsets` [documents + 1]: where each document starts in the token file, and where the last one ends.
    """
    bounds = np.asarray(offsets, dtype=np.int64)
    lengths = np.diff(bounds)
    trained = lengths >= 2  # a single token has no next token inside its document
    starts, lengths = bounds[:-1][trained], lengths[trained]
    inputs = lengths - 1 if document_mask else lengths
    counts = -(-inputs // sequence_length)
    if not document_mask:
        # a last piece of exactly one input would hold only the final token: nothing to predict, so leave it out
        lonely = (inputs % sequence_length == 1) & (counts > 1)
        inputs = inputs - lonely
        counts = -(-inputs // sequence_length)
    total = int(counts.sum())
    first = np.cumsum(counts) - counts
    order = np.arange(total, dtype=np.int64) - np.repeat(first, counts)
    piece_start = np.repeat(starts, counts) + order * sequence_length
    piece_inputs = np.minimum(np.repeat(inputs, counts) - order * sequence_length, sequence_length)
    return Pieces(piece_start, piece_inputs, int((counts > 1).sum()), int((~trained).sum()))


def best_fit(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """Best-fit decreasing: the bin of each item, [items] int64, bins numbered from 0 in the order they are opened.

    Items are taken from long to short (ties in order); each goes to the bin with the least room that still holds it.
    Equal items are placed in bulk: when r is the least room >= l, a bin with room r takes floor(r / l) items of length
    l in a row, because its shrinking room stays the least. So the work grows with the number of distinct (length, room)
    pairs met, not with the number of items.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return np.empty(0, dtype=np.int64)
    if int(sizes.min()) < 1 or int(sizes.max()) > capacity:
        raise ValueError(f"lengths must lie in [1, {capacity}], got {int(sizes.min())} to {int(sizes.max())}")
    bin_of = np.empty(sizes.size, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, first, counts = np.unique(-sizes[order], return_index=True, return_counts=True)
    rooms = _Rooms()
    opened = 0
    for length, begin, count in zip((-distinct).tolist(), first.tolist(), counts.tolist(), strict=True):
        items = order[begin : begin + count]
        while items.size:
            room = rooms.least(length)
            if room is None:
                wanted = -(-items.size // (capacity // length))
                rooms.add(capacity, np.arange(opened, opened + wanted, dtype=np.int64))
                opened += wanted
                continue
            items = _fill(bin_of, items, rooms, room, length)
    return bin_of


def _fill(
    bin_of: NDArray[np.int64], items: NDArray[np.int64], rooms: _Rooms, room: int, length: int
) -> NDArray[np.int64]:
    """Put items of one length into the bins that have `room`; gives the items that are left."""
    each = room // length
    bins = rooms.take(room, -(-items.size // each))
    placed = min(items.size, bins.size * each)
    bin_of[items[:placed]] = np.repeat(bins, each)[:placed]
    full, rest = divmod(placed, each)
    rooms.add(room - each * length, bins[:full])
    if rest:
        rooms.add(room - rest * length, bins[full : full + 1])
    return items[placed:]


class _Rooms:
    """Bins by the room they have left; `least(l)` finds the smallest room >= l through one big-integer bit mask."""

    def __init__(self) -> None:
        self._bins: dict[int, list[NDArray[np.int64]]] = {}
        self._mask = 0

    def least(self, length: int) -> int | None:
        above = self._mask >> length
        return length + (above & -above).bit_length() - 1 if above else None

    def add(self, room: int, bins: NDArray[np.int64]) -> None:
        if room > 0 and bins.size:  # a full bin never takes anything again
            self._bins.setdefault(room, []).append(bins)
            self._mask |= 1 << room

    def take(self, room: int, wanted: int) -> NDArray[np.int64]:
        """Up to `wanted` bins with this room, oldest first; they leave this class."""
        chunks = self._bins[room]
        taken: list[NDArray[np.int64]] = []
        while chunks and wanted > 0:
            chunk = chunks.pop(0)
            if chunk.size > wanted:
                chunks.insert(0, chunk[wanted:])
                chunk = chunk[:wanted]
            taken.append(chunk)
            wanted -= chunk.size
        if not chunks:
            del self._bins[room]
            self._mask &= ~(1 << room)
        return np.concatenate(taken)


def pack(
    offsets: NDArray[np.integer], sequence_length: int, mode: str, *, document_mask: bool, window: int = WINDOW
) -> PackTable:
    """The rows of the `best_fit` or `pad` mode (`concat` needs no table: see `concat_rows`).

    Within a row, pieces stand in file order; the rows of one window come before those of the next.
    """
    if mode not in ("best_fit", "pad"):
        raise ValueError(f"packing {mode!r} has no table; expected 'best_fit' or 'pad'")
    pieces = cut_documents(offsets, sequence_length, document_mask=document_mask)
    count = len(pieces.start)
    if mode == "pad":
        rows = np.arange(count, dtype=np.int64)
    else:
        rows = np.empty(count, dtype=np.int64)
        used = 0
        for begin in range(0, count, window):
            bins = best_fit(pieces.inputs[begin : begin + window], sequence_length)
            rows[begin : begin + window] = bins + used
            used += int(bins.max()) + 1
    order = np.argsort(rows, kind="stable")
    row_count = int(rows.max()) + 1 if count else 0
    row_offsets = np.zeros(row_count + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=row_count), out=row_offsets[1:])
    return PackTable(
        pieces.start[order], pieces.inputs[order], row_offsets, pieces.split_documents, pieces.dropped_documents
    )
