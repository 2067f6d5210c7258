"""metrics.jsonl: the history of a run, one strict JSON object a line, append-only, no duplicates after a resume."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from trainwright.base.events import Record
from trainwright.monitor.records import from_json_line, to_json_line

__all__ = ["JsonlSink", "read_history", "rewind_history"]

DURABLE_KINDS = frozenset({"eval", "report", "checkpoint.saved", "checkpoint.failed", "run.end"})
"""After these the file is synced to disk: what they say must outlive a power cut."""


class JsonlSink:
    """Appends records to `path`.

    Args:
        path: made with its folder when it does not exist. A last line torn by a crash is removed.
        resume_step: records of later steps are removed first, see `rewind_history`; None keeps all.
        flush_records, flush_seconds: lines reach the file after this many records or seconds.
    """

    name = "metrics.jsonl"

    def __init__(
        self,
        path: Path | str,
        *,
        resume_step: int | None = None,
        flush_records: int = 50,
        flush_seconds: float = 1.0,
    ) -> None:
        self.path = Path(path)
        self._resume_step = resume_step
        self._flush_records = flush_records
        self._flush_seconds = flush_seconds
        self._waiting: list[bytes] = []
        self._flushed_at = time.monotonic()
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rewind_history(self.path, self._resume_step)
        # Unbuffered: what a failed write leaves behind must not be written again later.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed by close()

    def write(self, record: Record) -> None:
        self._waiting.append(to_json_line(record))
        if record["kind"] in DURABLE_KINDS:
            self._flush(durable=True)
        elif len(self._waiting) >= self._flush_records:
            self._flush()

    def tick(self) -> None:
        if self._waiting and time.monotonic() - self._flushed_at >= self._flush_seconds:
            self._flush()

    def close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            self._file = file
            self._flush(durable=True)
            self._file = None

    def _flush(self, *, durable: bool = False) -> None:
        assert self._file is not None, "written before open"
        data, self._waiting = b"".join(self._waiting), []
        self._flushed_at = time.monotonic()
        while data:  # an unbuffered write may take less than all of it
            data = data[self._file.write(data) :]
        if durable:
            os.fsync(self._file.fileno())


def read_history(path: Path | str, *kinds: str) -> Iterator[Record]:
    """Records of a metrics.jsonl in order, of the given kinds or of all; lines that are not records are left out.

    Only a crash leaves such a line, as the last one, so a file that is being written can be read at any time.
    """
    with open(path, "rb") as file:
        for line in file:
            try:
                record = from_json_line(line)
            except ValueError:
                continue
            if not kinds or record.get("kind") in kinds:
                yield record


def rewind_history(path: Path, step: int | None) -> int:
    """Remove what a run that goes on from `step` will write again; gives the number of lines removed.

    Removed are records whose `step` is larger (none when `step` is None) and lines torn by a crash. Records without a
    step stay: they say what happened, such as a start or a warning. The file is replaced in one move.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    kept = [line for line in lines if _stays(line, step)]
    if len(kept) == len(lines):
        return 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(lines) - len(kept)


def _stays(line: bytes, step: int | None) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = from_json_line(line)
    except ValueError:
        return False
    recorded = record.get("step")
    return step is None or not isinstance(recorded, int) or recorded <= step
