"""What is known of a split once its examples are written: groups, packed rows, and the counts of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.dataset import IGNORE
from trainwright.data.documents import EXAMPLES_KEPT, Problems
from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.examples.intake import SplitRecords
from trainwright.data.examples.manifest import ExampleFacts
from trainwright.data.mixture import RowGroup
from trainwright.data.packing import WINDOW, best_fit
from trainwright.data.records.record import dropped_records
from trainwright.data.storage import write_array

__all__ = ["Tally", "finish_rows", "pack_examples", "read_flat", "split_facts", "trained_labels"]

_ON_DISK = {"int32": "<i4", "int64": "<i8", "float32": "<f4"}


@dataclass
class Tally:
    """Counts while records are encoded."""

    dropped: Problems = field(default_factory=Problems)
    truncated: int = 0
    cut_tokens: int = 0
    trained: list[int] = field(default_factory=list)
    """Trained labels of every example."""


def trained_labels(labels: Any) -> int:
    """How many labels are trained: neither -100 nor NaN."""
    array = np.asarray(labels)
    return int((~np.isnan(array)).sum() if array.dtype.kind == "f" else (array != IGNORE).sum())


def read_flat(folder: Path, name: str, dtype: str) -> NDArray[Any]:
    """A file of an unfinished build as an array."""
    path = folder / name
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def pack_examples(
    lengths: NDArray[np.int64], sequence_length: int, window: int = WINDOW
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole examples into rows by best-fit decreasing: (bounds [rows + 1], examples [examples]); row r holds
    examples[bounds[r]:bounds[r + 1]], in file order. Deterministic."""
    rows = np.empty(len(lengths), dtype=np.int64)
    used = 0
    for begin in range(0, len(lengths), window):
        bins = best_fit(lengths[begin : begin + window], sequence_length)
        rows[begin : begin + window] = bins + used
        used += int(bins.max()) + 1
    bounds = np.zeros(used + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=used), out=bounds[1:])
    return bounds, np.argsort(rows, kind="stable")


def finish_rows(
    folder: Path, split: str, groups: Sequence[tuple[str, float | None, int]], sequence_length: int, *, packed: bool
) -> tuple[RowGroup, ...]:
    """Divide the examples of a split among rows, and write down which where they are packed.

    Args:
        groups: name, weight and number of records of every source; sources without weights are one group.

    Raises DataError for a source of a mixture that gives no example.
    """
    ends = read_flat(folder, f"{split}.tokens.idx", "<u8").astype(np.int64)
    lengths = ends[1:] - ends[:-1]
    records = read_flat(folder, f"{split}.record.idx", "<u8").astype(np.int64)
    weighted = any(weight is not None for _, weight, _ in groups)
    named = groups if weighted else [("all", None, sum(count for _, _, count in groups))]
    stops = np.searchsorted(records, np.cumsum([count for _, _, count in named])).tolist()
    found: list[RowGroup] = []
    starts: list[NDArray[np.int64]] = []
    examples: list[NDArray[np.int64]] = []
    rows = 0
    for (name, weight, _), begin, end in zip(named, [0, *stops], stops, strict=False):
        if weighted and end == begin:
            raise DataError(f"no {split} examples from {name}, which the mixture draws from")
        count = end - begin
        if packed:
            bounds, order = pack_examples(lengths[begin:end], sequence_length)
            starts.append(bounds[:-1] + begin)
            examples.append(order + begin)
            count = len(bounds) - 1
        found.append(RowGroup(name, rows, count, weight))
        rows += count
    if packed:
        write_array(
            folder / f"{split}.rows.idx", np.concatenate([*starts, np.asarray([len(lengths)])]).astype(np.uint64)
        )
        write_array(folder / f"{split}.rows.example", np.concatenate(examples).astype(np.uint64))
    return tuple(found)


def split_facts(
    folder: Path,
    split: str,
    read: SplitRecords,
    tally: Tally,
    groups: tuple[RowGroup, ...],
    encoder: ExampleEncoder,
    unknown: int | None,
    *,
    packed: bool,
) -> ExampleFacts:
    """The counts of a split whose files are complete; `unknown` is the id of the tokenizer's unknown token."""
    kinds = {feature.name: _ON_DISK[feature.dtype] for feature in encoder.features}
    ends = read_flat(folder, f"{split}.tokens.idx", "<u8").astype(np.int64)
    inputs = read_flat(folder, f"{split}.input_ids.bin", kinds["input_ids"])
    labels = read_flat(folder, f"{split}.labels.bin", kinds["labels"])
    trained = np.asarray(tally.trained, dtype=np.int64)
    noted = dict(sorted(read.skipped.counts.items()))
    lost = {kind: count for kind, count in noted.items() if dropped_records(Problems({kind: count}))}
    return ExampleFacts(
        records=read.records,
        examples=len(trained),
        rows=sum(group.rows for group in groups),
        packed=packed,
        inputs=int(ends[-1]),
        trained_tokens=int(trained.sum()),
        untrained_examples=int((trained == 0).sum()),
        longest=int((ends[1:] - ends[:-1]).max(initial=0)),
        truncated=tally.truncated,
        cut_tokens=tally.cut_tokens,
        dropped=dict(sorted(tally.dropped.counts.items())),
        dropped_examples=tally.dropped.examples[:EXAMPLES_KEPT],
        skipped=lost,
        repaired={kind: count for kind, count in noted.items() if kind not in lost},
        skipped_examples=read.skipped.examples[:EXAMPLES_KEPT],
        groups=groups,
        unknown_tokens=0 if unknown is None else int((inputs == unknown).sum()),
        must_train={str(one): int((labels == one).sum()) for one in getattr(encoder, "must_train_ids", ())},
    )
