"""Examples on disk: flat arrays per feature with offsets, records as JSON lines with offsets, all hashed in blocks.

train.input_ids.bin     int32, the tokens of all examples, one behind the other
train.tokens.idx        uint64 [examples + 1], where each example's tokens start: shared by all "tokens" features
train.labels.bin        of the axis "tokens" as above; of "row" examples x shape; of "target" with train.labels.idx
train.record.idx        uint64 [examples], the record that each example comes from
train.pieces.jsonl/.idx one line per example: which part of its record it is; empty where it is the whole
train.records.jsonl/.idx one line per record: {"fields", "where", "key"}
train.rows.idx, train.rows.example  packed splits: which examples stand in each row
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.examples.example import Example, Feature, Piece
from trainwright.data.storage import BlockArray, FileFacts, write_array

__all__ = [
    "ExampleWriter",
    "LineWriter",
    "Lines",
    "check_features",
    "flat",
    "offsets_of",
    "open_array",
    "piece_line",
    "read_piece",
    "read_records",
    "record_line",
    "record_of",
    "split_arrays",
]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BUFFER = 1 << 20


def check_features(features: Sequence[Feature]) -> None:
    """Refuse features that cannot be stored. These are bugs of a task, so ValueError."""
    names = [feature.name for feature in features]
    if len(set(names)) < len(names):
        raise ValueError(f"two features have the same name: {names}")
    by_name = {feature.name: feature for feature in features}
    if not {"input_ids", "labels"} <= set(names) or by_name["input_ids"].axis != "tokens":
        raise ValueError(f"examples need input_ids (axis 'tokens') and labels, got {names}")
    for feature in features:
        if not _NAME.fullmatch(feature.name) or feature.name in ("tokens", "record", "records", "rows", "pieces"):
            raise ValueError(f"a feature cannot be called {feature.name!r}")
        if feature.axis != "row" and feature.shape:
            raise ValueError(f"feature {feature.name}: only features of the axis 'row' have a shape")


def offsets_of(feature: Feature) -> str | None:
    """The name of the offsets that cut a feature's flat array into examples; None where all have one shape."""
    return {"tokens": "tokens", "target": feature.name, "row": None}[feature.axis]


def split_arrays(split: str, features: Sequence[Feature], *, packed: bool) -> dict[str, tuple[str, str]]:
    """The arrays of a split: role to (file name, dtype)."""
    files: dict[str, tuple[str, str]] = {
        feature.name: (f"{split}.{feature.name}.bin", feature.dtype) for feature in features
    }
    for name in {offsets_of(feature) for feature in features} - {None}:
        files[f"{name}.idx"] = (f"{split}.{name}.idx", "uint64")
    for name in ("pieces", "records"):
        files[name] = (f"{split}.{name}.jsonl", "uint8")
        files[f"{name}.idx"] = (f"{split}.{name}.idx", "uint64")
    files["record.idx"] = (f"{split}.record.idx", "uint64")
    if packed:
        files["rows.idx"] = (f"{split}.rows.idx", "uint64")
        files["rows.example"] = (f"{split}.rows.example", "uint64")
    return files


class ExampleWriter:
    """Appends the examples of one split to its files. `finish` makes them durable."""

    def __init__(self, folder: Path, split: str, features: Sequence[Feature]) -> None:
        self._folder = folder
        self._split = split
        self._features = tuple(features)
        self._names = {feature.name for feature in features}
        self._files = {f.name: (folder / f"{split}.{f.name}.bin").open("wb", buffering=_BUFFER) for f in features}
        self._ends: dict[str, list[int]] = {n: [0] for f in features if (n := offsets_of(f)) is not None}
        self._records: list[int] = []
        self._pieces = LineWriter(folder, f"{split}.pieces")

    @property
    def examples(self) -> int:
        return len(self._records)

    def add(self, record: int, example: Example) -> None:
        """Append an example of a record. Raises ValueError where its arrays are not what the features say."""
        if set(example.arrays) != self._names:
            raise ValueError(f"the example has {sorted(example.arrays)}, the features are {sorted(self._names)}")
        length = example.length
        for feature in self._features:
            array = np.asarray(example.arrays[feature.name], dtype=feature.dtype)
            if feature.axis == "row":
                if array.shape != feature.shape:
                    raise ValueError(f"{feature.name} has the shape {array.shape}; the feature says {feature.shape}")
            elif array.ndim != 1 or (feature.axis == "tokens" and len(array) != length):
                raise ValueError(f"{feature.name} has the shape {array.shape} beside {length} input tokens")
            if feature.axis == "target":
                self._ends[feature.name].append(self._ends[feature.name][-1] + len(array))
            self._files[feature.name].write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        self._ends["tokens"].append(self._ends["tokens"][-1] + length)
        self._records.append(record)
        self._pieces.add(piece_line(example.piece))

    def finish(self) -> None:
        """Write the offsets and make everything durable."""
        for file in self._files.values():
            _durable(file)
        self._pieces.finish()
        for name, ends in self._ends.items():
            write_array(self._folder / f"{self._split}.{name}.idx", np.asarray(ends, dtype=np.uint64))
        write_array(self._folder / f"{self._split}.record.idx", np.asarray(self._records, dtype=np.uint64))

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()
        self._pieces.close()


class LineWriter:
    """Appends lines to `NAME.jsonl`; `finish` writes `NAME.idx`, where each line starts and the last one ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self._index = folder / f"{name}.idx"
        self._file = (folder / f"{name}.jsonl").open("wb", buffering=_BUFFER)
        self.ends = [0]

    def add(self, line: bytes) -> None:
        """Append one line; `line` does not hold its line break."""
        self._file.write(line + b"\n")
        self.ends.append(self.ends[-1] + len(line) + 1)

    def finish(self) -> None:
        _durable(self._file)
        write_array(self._index, np.asarray(self.ends, dtype=np.uint64))

    def close(self) -> None:
        self._file.close()


def _durable(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def record_line(fields: Mapping[str, Any], where: str, key: str) -> bytes:
    """A record as JSON. Raises DataError for values that JSON has no form for."""
    try:
        text = json.dumps({"fields": fields, "where": where, "key": key}, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:  # UnicodeEncodeError, of a lone surrogate, is a ValueError
        raise DataError(
            f"{where}: the record cannot be stored: {error}",
            hint="a record holds texts, numbers, true, false, null, and lists and objects of them",
        ) from error


def piece_line(piece: Piece) -> bytes:
    """A Piece as JSON; nothing for the usual one, a whole record without facts."""
    if piece == Piece():
        return b""
    return json.dumps([piece.index, piece.count, dict(piece.facts)], ensure_ascii=False).encode("utf-8")


def read_piece(line: bytes) -> Piece:
    """The inverse of `piece_line`."""
    return Piece(*json.loads(line)) if line else Piece()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of an unfinished build, straight from the file: {"fields", "where", "key"} each."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def record_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A record as tasks see it: its fields, and "where" it came from, for messages."""
    return {**stored["fields"], "where": stored["where"]}


class Lines(Sequence[Any]):
    """Lines of a file read on demand, each parsed by `_parse`. Blocks are checked against their hashes."""

    def __init__(self, content: BlockArray, index: BlockArray, parse: Any) -> None:
        self._content = content
        self._index = index
        self._parse = parse

    def __len__(self) -> int:
        return len(self._index) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        place = int(number) + (len(self) if number < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"line {number} of {len(self)}")
        start, stop = (int(end) for end in self._index.read(place, place + 2))
        return self._parse(self._content.read(start, stop - 1).tobytes())


def open_array(folder: Path, name: str, dtype: str, facts: Mapping[str, FileFacts]) -> BlockArray:
    """A file of a dataset folder. Raises DataError when the manifest does not list it, or it is damaged."""
    if name not in facts:
        raise DataError(f"{folder}: the manifest does not list {name}", hint="delete the folder and build it again")
    return BlockArray(folder / name, dtype, facts[name])


def flat(array: BlockArray) -> NDArray[Any]:
    """All of a file, checked."""
    return array.read(0, len(array))
