"""Predictions for a file of records, written as JSON lines or in a format of the task."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from trainwright.base.errors import DataError
from trainwright.data.examples.encoding import Refusal
from trainwright.data.records.record import SHAPES, TASK_SHAPES
from trainwright.data.records.writing import check_writable, write_records
from trainwright.tasks.labels import place_of
from trainwright.trainer.assess import predict
from trainwright.trainer.trained import Trained

__all__ = ["LINES", "predict_file"]

LINES = "lines"
"""Format of a file of which each line is a text to predict for."""


def predict_file(
    trained: Trained,
    source: str,
    *,
    out: Path | None,
    to: str | None,
    rows: int,
    stdin: IO[str],
    format: str | None = None,
) -> tuple[list[str], list[str]]:
    """Predict for every record of `source`, in order; "-" reads `stdin`: JSON lines, or one text a line.

    Args:
        format: of the source: `LINES`, or as `predict` takes it.

    Returns: lines to print (none when `out` is given), and of each record that could not be used where it stands and
    why. It has a line that says so, but none in a format of the task.

    Raises:
        ConfigError: `to` is no format of the task.
        DataError: the records cannot be read, or predictions do not fit the format `to`.
    """
    shape = trained.records_shape()
    if to is not None:
        check_writable(shape, to)
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if source == "-" or format == LINES:
            name = "standard input" if source == "-" else source
            text = stdin.read() if source == "-" else _read(source)
            path, format = _stored(text, name, Path(folder), trained.section.name), "auto"
        try:
            found = list(predict(trained, path, rows=rows, format=format))
        except DataError as error:
            if Path(source).suffix != ".txt" or path != source:
                raise
            hint = "; or, ".join(filter(None, (error.hint, f"where every line is a text, --format {LINES}")))
            raise DataError(error.message, hint=hint) from error
    refused = [place_of(record) + given.message for record, given in found if isinstance(given, Refusal)]
    if out is None:
        return [_line(prediction) for _, prediction in found], refused
    if to is None:
        _write(out, (_line(prediction) + "\n" for _, prediction in found))
        return [], refused
    whole = [{**record, **prediction} for record, prediction in found if not isinstance(prediction, Refusal)]
    write_records(whole, out, to, shape=shape)
    return [], refused


def _line(prediction: Mapping[str, Any] | Refusal) -> str:
    value = {"error": prediction.message} if isinstance(prediction, Refusal) else _plain(prediction)
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """JSON values: what numpy counts and measures becomes Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


_OF_A_TEXT: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    "labelled": lambda text: {"text": text},
    "tagged": lambda text: {"text": text},
    "pair": lambda text: {"source": text},
    "anchors": lambda text: {"anchor": text},
    "messages": lambda text: {"messages": [{"role": "user", "content": text}]},
}
"""The shape of a task's records to the record that a text by itself is, where it is one."""


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{source}: {error.strerror}", hint=f"check the path; --format {LINES} reads one file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason}", hint="convert it (iconv -t UTF-8)") from None


def _stored(text: str, name: str, folder: Path, task: str) -> str:
    """Lines as a file of records: JSON objects as they are, other lines as texts.

    Raises DataError where nothing came, and for texts where a record of the task is more than a text.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{name} is empty", hint="give one record (JSON) or one text a line")
    if not all(line.lstrip().startswith("{") for line in lines):
        shape = SHAPES[TASK_SHAPES[task]]
        if shape.name not in _OF_A_TEXT:
            raise DataError(
                f"{name} begins {lines[0]!r:.60}; the task {task} reads {shape.what}",
                hint=f"give one JSON object a line, with {', '.join(shape.needs)}",
            )
        lines = [json.dumps(_OF_A_TEXT[shape.name](line.strip()), ensure_ascii=False) for line in lines]
    path = folder / "lines.jsonl"
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
