"""The unfinished half of a dataset: token files that only grow, and a journal that says how far they are good.

A build appends tokens and document ends to its files and, every second or so, makes them durable and then commits a
small state file (by rename) with their lengths, all counts and the cursor behind the last segment. Killed at any
moment, the next build cuts the files back to the committed lengths and goes on from the cursor: the bytes come out
the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainwright.base.faults import fault_point
from trainwright.data.corpus import Segment
from trainwright.data.documents import Problems
from trainwright.data.encoding import Encoded
from trainwright.data.storage import write_bytes

__all__ = ["BuildState", "Counts", "TokenWriter"]

STATE_NAME = "build-state.json"
COMMIT_SECONDS = 1.0
SPLITS = ("train", "validation")


@dataclass
class Counts:
    """What one source gave one split."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    unknown: int = 0


@dataclass
class BuildState:
    """Everything a build must remember: committed together, so that it is always consistent."""

    key: str
    tokenizer: str
    cursor: tuple[int, int, int] = (0, 0, 0)
    problems: Problems = field(default_factory=Problems)
    """Of the shards before the cursor's shard."""
    counts: dict[str, list[Counts]] = field(default_factory=dict)
    """Per split, per source."""

    def to_json(self) -> bytes:
        counts = {split: [asdict(one) for one in sources] for split, sources in self.counts.items()}
        value = {
            "key": self.key,
            "tokenizer": self.tokenizer,
            "cursor": self.cursor,
            "problems": self.problems.to_dict(),
            "counts": counts,
        }
        return json.dumps(value, ensure_ascii=False).encode("utf-8")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BuildState:
        counts = {split: [Counts(**one) for one in sources] for split, sources in value["counts"].items()}
        source, shard, number = value["cursor"]
        return cls(
            value["key"], value["tokenizer"], (source, shard, number), Problems.from_dict(value["problems"]), counts
        )


class TokenWriter:
    """Appends encoded segments to `tokens-SPLIT.bin` and `docs-SPLIT.idx` in `folder`, resumably.

    Opening it in a folder with a committed state of the same key and tokenizer goes on from there.
    """

    def __init__(self, folder: Path, key: str, tokenizer: str, sources: int, dtype: str) -> None:
        self.folder = folder
        self._itemsize = np.dtype(dtype).itemsize
        self._dtype = np.dtype(dtype).newbyteorder("<")
        found = self._committed(key, tokenizer)
        fresh = {split: [Counts() for _ in range(sources)] for split in SPLITS}
        self.state = found or BuildState(key, tokenizer, counts=fresh)
        self._tokens = {split: sum(one.tokens for one in self.state.counts[split]) for split in SPLITS}
        self._documents = {split: sum(one.documents for one in self.state.counts[split]) for split in SPLITS}
        self._files: dict[str, IO[bytes]] = {}
        for split in SPLITS:
            self._files["tokens-" + split] = self._open(f"tokens-{split}.bin", self._tokens[split] * self._itemsize)
            # where documents start; the end of the last one is written when the build finishes
            self._files["docs-" + split] = self._open(f"docs-{split}.idx", self._documents[split] * 8)
        self._last_commit = time.monotonic()

    @property
    def resumed(self) -> bool:
        """Whether an earlier build's work is in the files."""
        return any(self._tokens.values())

    def _committed(self, key: str, tokenizer: str) -> BuildState | None:
        path = self.folder / STATE_NAME
        if not path.exists():
            return None
        state = BuildState.from_json(json.loads(path.read_text(encoding="utf-8")))
        if (state.key, state.tokenizer) != (key, tokenizer):
            return None
        for split in SPLITS:
            for name, size in (
                (f"tokens-{split}.bin", sum(one.tokens for one in state.counts[split]) * self._itemsize),
                (f"docs-{split}.idx", sum(one.documents for one in state.counts[split]) * 8),
            ):
                if not (self.folder / name).exists() or (self.folder / name).stat().st_size < size:
                    return None  # someone emptied the folder: begin again
        return state

    def _open(self, name: str, size: int) -> IO[bytes]:
        file = (self.folder / name).open("ab", buffering=1 << 20)
        file.truncate(size)
        return file

    def write(self, batch: Sequence[Segment], encoded: Encoded) -> None:
        """Append a batch; commits when the last commit is a second old."""
        fault_point("build.write", source=batch[-1].source, shard=batch[-1].shard, number=batch[-1].number)
        in_split = np.asarray([segment.split == "validation" for segment in batch])
        for split, chosen in (("train", ~in_split), ("validation", in_split)):
            if chosen.any():
                self._append(split, [s for s, mine in zip(batch, chosen, strict=True) if mine], encoded, chosen)
        last = batch[-1]
        self.state.cursor = (last.source, last.shard, last.number + 1)
        self.state.problems = last.problems
        if time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def _append(self, split: str, segments: list[Segment], encoded: Encoded, chosen: Any) -> None:
        lengths = encoded.lengths[chosen]
        tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, encoded.lengths)]
        if tokens.size:
            self._files["tokens-" + split].write(np.ascontiguousarray(tokens, self._dtype).data.cast("B"))
        starts = self._tokens[split] + np.cumsum(lengths) - lengths
        first = np.asarray([segment.first for segment in segments])
        self._files["docs-" + split].write(starts[first].astype("<u8").tobytes())
        self._tokens[split] += int(lengths.sum())
        self._documents[split] += int(first.sum())
        numbers = zip(
            segments, lengths.tolist(), encoded.unknown[chosen].tolist(), encoded.bytes[chosen].tolist(), strict=True
        )
        for segment, length, unknown, size in numbers:
            counts = self.state.counts[split][segment.source]
            counts.documents += segment.first
            counts.tokens += length
            counts.characters += len(segment.text)
            counts.bytes += size
            counts.unknown += unknown

    def commit(self) -> None:
        """Make everything written so far survive a kill or a power cut."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        fault_point("build.before_commit")
        scratch = self.folder / (STATE_NAME + ".new")
        write_bytes(scratch, self.state.to_json())
        os.replace(scratch, self.folder / STATE_NAME)
        self._last_commit = time.monotonic()
        fault_point("build.after_commit")

    def finish(self) -> None:
        """Close the document index of each split with the end of its last document, and all files."""
        self.commit()
        for split in SPLITS:
            file = self._files["docs-" + split]
            file.write(np.asarray([self._tokens[split]], dtype="<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        """Close the files as they are; what was not committed is cut off by the next build."""
        failures = []
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:  # a full disk refuses the last buffer; the other files still want closing
                failures.append(error)
        if failures:
            raise failures[0]
