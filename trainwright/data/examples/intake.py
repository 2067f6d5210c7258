"""Records of every split, read from their sources once and kept as JSON lines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.base.faults import fault_point
from trainwright.data.corpus import SPLIT_SEED
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.examples.build import ReadRecords
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.examples.storage import LineWriter, read_records, record_line, record_of

__all__ = ["Intake", "SplitRecords", "held_out", "held_out_fold", "stored_records"]

REPORT_EVERY = 4096  # records


@dataclass
class SplitRecords:
    """What was read for a split."""

    groups: list[tuple[str, float | None, int]] = field(default_factory=list)
    """Name, weight and number of records of every source."""
    skipped: Problems = field(default_factory=Problems)
    """What was wrong with records that were left out, or mended."""

    @property
    def records(self) -> int:
        return sum(count for _, _, count in self.groups)


@dataclass
class Intake:
    """Reads the sources of a spec into the files of a folder.

    Attributes:
        report: (bytes stored, records read) -> None, now and then.
    """

    spec: ExampleSpec
    shape: str
    folder: Path
    reader: ReadRecords
    report: Callable[[int, int], None]

    def read(self) -> dict[str, SplitRecords]:
        """Every split of the spec. Raises DataError for a split without records."""
        spec, splits = self.spec, {"train": SplitRecords()}
        if spec.fraction:
            splits["validation"] = SplitRecords()
            self._divide(splits["train"], splits["validation"])
        else:
            self._into("train", spec.train, splits["train"], weighted=spec.weighted)
            if spec.validation is not None:
                splits["validation"] = SplitRecords()
                self._into("validation", spec.validation.sources, splits["validation"])
        if spec.test:
            splits["test"] = SplitRecords()
            self._into("test", spec.test, splits["test"])
        for split, found in splits.items():
            if not found.records:
                raise self._none(split, found)
        return splits

    def _none(self, split: str, found: SplitRecords) -> DataError:
        held = self.spec.validation.sources if self.spec.validation else ()
        sources = {"test": self.spec.test, "validation": held or self.spec.train}.get(split, self.spec.train)
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in found.skipped.counts.items())
        return DataError(
            f"no {split} records in {', '.join(source.label for source in sources)}"
            + (f" (left out: {skipped})" if skipped else ""),
            hint="check data.source, data.format and data.columns"
            if split == "train"
            else f"check data.{split}, or leave it out",
        )

    def _into(self, split: str, sources: Sequence[SourceSpec], found: SplitRecords, *, weighted: bool = False) -> None:
        """The records of sources into the file of a split."""
        lines = LineWriter(self.folder, f"{split}.records")
        try:
            for source in sources:
                before = len(lines.ends)
                for line, _ in self._lines(source, found.skipped, lines.ends[-1]):
                    lines.add(line)
                found.groups.append((source.label, source.weight if weighted else None, len(lines.ends) - before))
            lines.finish()
        finally:
            lines.close()

    def _lines(self, source: SourceSpec, skipped: Problems, done: int) -> Iterator[tuple[bytes, str]]:
        """Each record of a source as it is stored, and its key."""
        spec = self.spec
        records = self.reader(
            source,
            self.shape,
            format=spec.format,
            columns=spec.columns,
            on_error=spec.on_error,
            problems=skipped,
            **spec.reading,
        )
        for number, record in enumerate(records):
            line = record_line(record.fields, record.where, record.key)
            done += len(line)
            if number % REPORT_EVERY == 0:
                fault_point("examples.read", number=number)
                self.report(done, number)
            yield line, record.key

    def _divide(self, train: SplitRecords, held: SplitRecords) -> None:
        """Training records into one file, then line by line into the two splits, by the hash of their keys."""
        scratch = self.folder / "records.all"
        hashes: list[int] = []
        counts: list[int] = []
        done = 0
        with scratch.open("wb") as file:
            for source in self.spec.train:
                before = len(hashes)
                for line, key in self._lines(source, train.skipped, done):
                    file.write(line + b"\n")
                    done += len(line) + 1
                    hashes.append(_hash_of(key))
                counts.append(len(hashes) - before)
        all_hashes, fold = np.asarray(hashes, dtype=np.uint64), self.spec.fold
        out = held_out(all_hashes, self.spec.fraction) if fold is None else held_out_fold(all_hashes, *fold)
        writers = {split: LineWriter(self.folder, f"{split}.records") for split in ("train", "validation")}
        try:
            with scratch.open("rb") as file:
                for line, is_held in zip(file, out.tolist(), strict=True):
                    writers["validation" if is_held else "train"].add(line[:-1])
            for writer in writers.values():
                writer.finish()
        finally:
            for writer in writers.values():
                writer.close()
        os.unlink(scratch)
        begin = 0
        for source, count in zip(self.spec.train, counts, strict=True):
            kept = int((~out[begin : begin + count]).sum())
            train.groups.append((source.label, source.weight if self.spec.weighted else None, kept))
            held.groups.append((source.label, None, count - kept))
            begin += count


def stored_records(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    """The records of a split of an unfinished build, as tasks see them."""
    for stored in read_records(folder / f"{split}.records.jsonl"):
        yield record_of(stored)


def held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which records are held out, bool [records]: those whose hash is below `fraction` of all hashes, but at least one,
    and never all. Raises DataError for fewer than two records, which cannot be divided."""
    if len(hashes) == 1:
        raise DataError(
            "one training record cannot be divided into training and validation",
            hint="add records, name data.validation sources, or set data.validation: none",
        )
    out: NDArray[np.bool_] = hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if len(hashes) and not out.any():
        out[int(np.argmin(hashes))] = True
    elif len(hashes) and out.all():
        out[int(np.argmax(hashes))] = False
    return out


def held_out_fold(hashes: NDArray[np.uint64], index: int, of: int) -> NDArray[np.bool_]:
    """Which records are in fold `index` of `of`, bool [records]: in the order of their hashes the folds are equally
    long, but records of one key stay together. Raises DataError where a fold would be empty."""
    places = np.searchsorted(np.sort(hashes), hashes, side="left")
    folds = places * of // max(len(hashes), 1)
    empty = [fold for fold in range(of) if not (folds == fold).any()]
    if empty:
        raise DataError(
            f"{len(hashes)} training records do not fill {of} folds", hint="use fewer folds, or add records"
        )
    out: NDArray[np.bool_] = folds == index
    return out


def _hash_of(key: str) -> int:
    """The 64 bits by which `documents.split_of` chooses a split."""
    digest = hashlib.blake2b(f"{SPLIT_SEED}\x1f{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
