"""From one format of a shape to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.data.documents import OnError, Problems, SourceSpec
from trainwright.data.records.reading import read_records
from trainwright.data.records.record import SHAPES, TASK_SHAPES
from trainwright.data.records.writing import write_records

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        written: records in the new file.
        read: what could not be read, or was mended.
        lost: what the new format could not hold.
    """

    written: int
    read: Problems
    lost: Problems


def convert(
    source: str | SourceSpec,
    destination: str | Path,
    *,
    to: str,
    task: str | None = None,
    shape: str | None = None,
    from_: str = "auto",
    columns: Mapping[str, str | int] | None = None,
    encoding: str = "utf-8",
    separator: str | None = None,
    names: Sequence[str] = (),
    scheme: str = "auto",
    to_scheme: str = "iob2",
    on_error: OnError = "stop",
) -> Converted:
    """Read a source and write it in the format `to`; give the shape, or the task whose records they are.

    The destination must not exist; it appears whole or not at all. Raises ConfigError, DataError.
    """
    if shape is None:
        if task not in TASK_SHAPES:
            raise ConfigError(
                f"task {task!r}; expected one of {', '.join(TASK_SHAPES)}.{did_you_mean(str(task), TASK_SHAPES)}"
            )
        shape = TASK_SHAPES[task]
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r}; expected one of {', '.join(SHAPES)}.{did_you_mean(shape, SHAPES)}")
    spec = SourceSpec(source) if isinstance(source, str) else source
    problems = Problems()
    records = read_records(
        spec,
        shape,
        format=from_,
        columns=columns,
        encoding=encoding,
        separator=separator,
        names=names,
        scheme=scheme,
        on_error=on_error,
        problems=problems,
    )
    try:
        done = write_records(
            records, destination, to, shape=shape, scheme=to_scheme, on_error=on_error, overwrite=False
        )
    except DataError as error:
        if problems.total and "no records to write" in error.message:
            shown = "".join(f"\n     {line}" for line in problems.examples[:5])
            raise DataError(f"{spec.label}: no record could be read{shown}", hint=error.hint) from error
        raise
    return Converted(done.records, problems, done.problems)
