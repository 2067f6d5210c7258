"""Predictions for a file of records, written as JSON lines or in a format of the task."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from trainwright.base.errors import DataError
from trainwright.trainer.assess import Trained, predict

__all__ = ["predict_file"]


def predict_file(
    trained: Trained,
    source: str,
    *,
    out: Path | None,
    to: str | None,
    rows: int,
    stdin: IO[str],
    format: str | None = None,
) -> tuple[list[str], int]:
    """Predict for every record of `source` ("-" reads `stdin`), in order.

    Returns: lines to print (none when `out` is given), and how many records could not be used.

    Raises:
        DataError: the records cannot be read, or predictions do not fit the format `to`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _stored(stdin, Path(folder)) if source == "-" else source
        found = list(predict(trained, path, rows=rows, format="auto" if source == "-" else format))
    failed = sum(prediction is None for _, prediction in found)
    if out is None:
        return [_line(prediction) for _, prediction in found], failed
    if to is None:
        _write(out, (_line(prediction) + "\n" for _, prediction in found))
        return [], failed
    from trainwright.data.records.writing import write_records

    whole = [{**record, **prediction} for record, prediction in found if prediction is not None]
    write_records(whole, out, to)
    return [], failed


def _line(prediction: Mapping[str, Any] | None) -> str:
    value = {"error": "this record gives no example"} if prediction is None else _plain(prediction)
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """JSON values: what numpy counts and measures becomes Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _stored(stream: IO[str], folder: Path) -> str:
    """Standard input as a file: JSON lines as they are, other lines as texts."""
    lines = [line for line in stream.read().splitlines() if line.strip()]
    if not lines:
        raise DataError("standard input is empty", hint="send one record (JSON) or one text a line")
    if not all(line.lstrip().startswith("{") for line in lines):
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    path = folder / "stdin.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write beside the final name, then rename: half a file never stands under it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
