"""Predictions for a file of records, written as JSON lines or in a format of the task."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.examples.encoding import Refusal
from trainwright.data.records.record import SHAPES, TASK_SHAPES
from trainwright.data.records.writing import check_writable, write_records
from trainwright.tasks.labels import place_of
from trainwright.trainer.assess import predict
from trainwright.trainer.trained import Reading, Trained

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
    columns: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Predict for every record of `source`, in order; "-" reads `stdin`.

    Args:
        format: of the source: `LINES`, a format of the task, or "auto"; None reads a file as the training data was
            read, and standard input, as "auto" does, as JSON lines or one text a line.
        columns: of the source, in place of those that the recipe's `data.columns` names.

    Returns: lines to print (none when `out` is given), and of each record that could not be used where it stands and
    why. It has a line that says so, but none in a format of the task.

    Raises:
        ConfigError: `to` is no format of the task, or columns are named where lines are texts.
        DataError: the records cannot be read, or predictions do not fit the format `to`.
    """
    shape = trained.records_shape()
    if to is not None:
        check_writable(shape, to)
    name = "standard input" if source == "-" else source
    with tempfile.TemporaryDirectory() as folder:
        path, reading = source, trained.reading.of_file(format, columns)
        if format == LINES or (source == "-" and format in (None, "auto")):
            lines = _lines(stdin.read() if source == "-" else _read(source), name)
            reading = trained.reading.of_file("auto", columns)
            if not all(line.lstrip().startswith("{") for line in lines if line.strip()):
                if columns:
                    raise ConfigError(f"{name} holds texts, which have no columns", hint="leave out --column")
                lines, reading = _records(lines, name, trained.section.name), Reading()
            path = _stored(lines, Path(folder) / "lines.jsonl")
        elif source == "-":
            path = _stored(stdin.read().split("\n"), Path(folder) / "standard-input")
        try:
            found = [
                (_placed(record, path, name), given if isinstance(given, Refusal) else _placed(given, path, name))
                for record, given in predict(trained, path, reading, rows=rows)
            ]
        except DataError as error:
            hint = error.hint
            if Path(source).suffix == ".txt" and path == source:
                hint = "; or, ".join(filter(None, (hint, f"where every line is a text, --format {LINES}")))
            raise DataError(error.message.replace(path, name), hint=hint) from error
    refused = [place_of(record) + given.message for record, given in found if isinstance(given, Refusal)]
    if out is None:
        return [_as_line(prediction) for _, prediction in found], refused
    if to is None:
        _write(out, (_as_line(prediction) + "\n" for _, prediction in found))
        return [], refused
    whole = [_answered(shape, record, given) for record, given in found if not isinstance(given, Refusal)]
    write_records(whole, out, to, shape=shape)
    return [], refused


def _placed(record: Mapping[str, Any], path: str, name: str) -> dict[str, Any]:
    """A record that says where it stands by the name of what was given, not of the file that was made of it."""
    places = {key: record[key].replace(path, name) for key in ("where", "id") if isinstance(record.get(key), str)}
    return {**record, **places}


def _answered(shape: str, record: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the prediction in the place of its answer."""
    if shape == "pair":
        return {key: value for key, value in record.items() if key != "references"} | {"target": prediction["text"]}
    if shape == "messages":
        messages = list(record["messages"])
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return {**record, "messages": [*asked, {"role": "assistant", "content": prediction["text"]}]}
    return {**record, **prediction}


def _as_line(prediction: Mapping[str, Any] | Refusal) -> str:
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


def _lines(text: str, name: str) -> list[str]:
    """Lines, blank ones in their places; line feeds alone end one. Raises DataError where nothing is in them."""
    if not text.strip():
        raise DataError(f"{name} is empty", hint="give one record (JSON) or one text a line")
    return text.rstrip().split("\n")


def _records(texts: Sequence[str], name: str, task: str) -> list[str]:
    """Texts as records in JSON, nothing where nothing is. Raises DataError where a record is more than a text."""
    shape = SHAPES[TASK_SHAPES[task]]
    if shape.name not in _OF_A_TEXT:
        first = next(text for text in texts if text.strip())
        raise DataError(
            f"{name} begins {first!r:.60}; the task {task} reads {shape.what}",
            hint=f"give one JSON object a line, with {', '.join(shape.needs)}",
        )
    records = [_OF_A_TEXT[shape.name](text.strip()) if text.strip() else None for text in texts]
    return ["" if record is None else json.dumps(record, ensure_ascii=False) for record in records]


def _stored(lines: Sequence[str], path: Path) -> str:
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
