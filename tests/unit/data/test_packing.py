from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data.packing import PackTable, best_fit, concat_rows, cut_documents, pack

lengths_of = st.lists(st.integers(0, 40), min_size=0, max_size=60)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left by the textbook algorithm, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, 30), max_size=80), capacity=st.integers(30, 60))
def test_best_fit_fills_bins_as_the_textbook_algorithm_does(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.asarray(lengths, dtype=np.int64), capacity)
    used = np.bincount(bins, weights=lengths) if lengths else np.empty(0)
    assert (used <= capacity).all()
    assert sorted((capacity - used).astype(int).tolist()) == naive_best_fit_decreasing(lengths, capacity)


def test_best_fit_refuses_items_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        best_fit(np.asarray([3, 11]), 10)


def trained_transitions(table: PackTable, offsets: np.ndarray) -> list[tuple[int, int]]:
    """(input, label) token positions of all rows, labels of a document's last token left out."""
    last = set((offsets[1:] - 1).tolist())
    return sorted(
        (position, position + 1)
        for start, inputs in zip(table.start.tolist(), table.inputs.tolist(), strict=True)
        for position in range(start, start + inputs)
        if position not in last
    )


@settings(deadline=None, max_examples=200)
@given(
    lengths=lengths_of,
    sequence_length=st.integers(2, 16),
    mode=st.sampled_from(["best_fit", "pad"]),
    mask=st.booleans(),
    window=st.sampled_from([1, 3, 1000]),
)
def test_every_transition_inside_a_document_is_trained_once(
    lengths: list[int], sequence_length: int, mode: str, mask: bool, window: int
) -> None:
    offsets = offsets_of(lengths)
    table = pack(offsets, sequence_length, mode, document_mask=mask, window=window)
    expected = [
        (position, position + 1)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for position in range(begin, end - 1)
    ]
    assert trained_transitions(table, offsets) == expected
    per_row = np.add.reduceat(table.inputs, table.row_offsets[:-1]) if table.rows else np.empty(0)
    assert (per_row <= sequence_length).all()
    assert (np.diff(table.row_offsets) >= 1).all()
    assert (np.diff(table.row_offsets) == 1).all() or mode == "best_fit"
    assert table.dropped_documents == sum(length < 2 for length in lengths)
    if mask:  # the last token of a document takes no slot, and no slot is without a label
        assert table.inputs.sum() == len(expected)


def test_pieces_of_a_row_stand_in_file_order() -> None:
    rng = np.random.default_rng(0)
    table = pack(offsets_of(rng.integers(2, 50, 500).tolist()), 64, "best_fit", document_mask=True)
    for begin, end in zip(table.row_offsets[:-1].tolist(), table.row_offsets[1:].tolist(), strict=True):
        assert (np.diff(table.start[begin:end]) > 0).all()


def test_long_documents_are_cut_with_one_token_of_overlap() -> None:
    pieces = cut_documents(np.asarray([0, 10, 12]), 4, document_mask=True)
    assert pieces.start.tolist() == [0, 4, 8, 10]
    assert pieces.inputs.tolist() == [4, 4, 1, 1]  # inputs 8..8 with label 9; the second document 10 -> 11
    assert pieces.split_documents == 1


def test_without_a_mask_a_lone_last_token_is_no_piece() -> None:
    pieces = cut_documents(np.asarray([0, 9]), 4, document_mask=False)
    assert pieces.inputs.tolist() == [4, 4]  # token 8 is only a label
    assert cut_documents(np.asarray([0, 4]), 4, document_mask=False).inputs.tolist() == [4]


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3)])
def test_concat_rows_cover_all_labels(tokens: int, rows: int) -> None:
    assert concat_rows(tokens, 8) == rows


def test_a_million_documents_pack_in_seconds_and_tightly() -> None:
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(5.5, 1.3, 1_000_000).astype(np.int64) + 2, 20_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    began = time.process_time()
    table = pack(offsets, 2048, "best_fit", document_mask=True)
    assert time.process_time() - began < 10
    assert table.inputs.sum() / (table.rows * 2048) > 0.999
