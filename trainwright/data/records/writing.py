"""Records into files: whole files or none, counting what a format could not hold."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.data.documents import OnError, Policy, Problems
from trainwright.data.records.formats import CONTAINERS
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.writers import WRITERS, Writer, flat_row

__all__ = ["Written", "check_writable", "write_records"]

_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
_ORDER = ("qa", "relation", "tagged", "messages", "pair", "anchors", "labelled", "text")


@dataclass
class Written:
    """How many records were written, and what could not be."""

    records: int = 0
    problems: Problems = field(default_factory=Problems)


def write_records(
    records: Iterable[Record | Mapping[str, Any]],
    path: str | Path,
    format: str,
    *,
    shape: str | None = None,
    scheme: str = "iob2",
    on_error: OnError = "stop",
    overwrite: bool = True,
) -> Written:
    """Write records in a format, or in a container (jsonl, json, csv, tsv) by their shape's own keys.

    Args:
        path: rows become csv, tsv or json where the name ends so, else jsonl; `.gz` compresses. `parallel` writes two
            files: `out.{de,en}`.
        format: a name of `writers.WRITERS`, or a container.
        shape: of the records; None tells it by the format, or by the keys of the first record.
        scheme: in which CoNLL tags are written (`tags.SCHEMES`).
        on_error: a record that the format cannot hold raises DataError, or is counted and left out.
        overwrite: False refuses a file that is there.

    The file appears whole, by renaming, or not at all.
    """
    stream = iter(records)
    first = next(stream, None)
    if first is None:
        raise DataError(f"{path}: there are no records to write", hint="check the source")
    shape = shape or _shape_of(format, _fields(first))
    writer, container = _writer(shape, format, str(path))
    policy = Policy(on_error, Problems())
    chain = _numbered(first, stream, path)
    targets = _targets(path, writer, overwrite=overwrite)
    written = Written(problems=policy.problems)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_beside(target)) for target in targets]
        if writer.document is not None:
            _write_document(files[0], writer, chain, written)
        elif writer.lines is not None:
            _write_lines(files, writer, chain, scheme, policy, written)
        else:
            _write_rows(files[0], writer, container, chain, policy, written)
        if not written.records:
            reasons = "".join(f"\n     {line}" for line in policy.problems.examples[:5])
            raise DataError(f"{path}: no record can be written as {format}{reasons}", hint="choose another format")
        if not overwrite:
            _targets(path, writer, overwrite=False)  # somebody else may have written it meanwhile
    return written


def _fields(record: Record | Mapping[str, Any]) -> Mapping[str, Any]:
    return record.fields if isinstance(record, Record) else record


def _numbered(
    first: Record | Mapping[str, Any], rest: Iterator[Record | Mapping[str, Any]], path: str | Path
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(fields, place for people) of every record."""
    number = 0
    item: Record | Mapping[str, Any] | None = first
    while item is not None:
        number += 1
        yield _fields(item), item.where if isinstance(item, Record) else f"record {number} of {path}"
        item = next(rest, None)


def _shape_of(format: str, fields: Mapping[str, Any]) -> str:
    owners = [shape for shape, writers in WRITERS.items() if format in writers]
    if len(owners) == 1:
        return owners[0]
    for shape in owners or _ORDER:
        if all(key in fields for key in SHAPES[shape].needs):
            return shape
    raise DataError(
        f"a record has {', '.join(fields) or 'nothing'}; expected the keys of one of {', '.join(SHAPES)}",
        hint="name the shape",
    )


def check_writable(shape: str, format: str) -> None:
    """Raises ConfigError where records of the shape are not written in the format; says in which they are."""
    _writer(shape, format, "")


def _writer(shape: str, format: str, path: str) -> tuple[Writer, str]:
    """The writer, and the container of rows."""
    writers = WRITERS[shape]
    ending = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    container = _ENDINGS.get(ending, "jsonl")
    if format in CONTAINERS:
        return next(iter(writers.values())), format
    if format not in writers:
        known = (*writers, *CONTAINERS)
        raise ConfigError(
            f"{format!r} cannot be written; {SHAPES[shape].what} ({shape}) is written as {', '.join(known)}."
            f"{did_you_mean(format, known)}"
        )
    writer = writers[format]
    if writer.cells and container not in ("csv", "tsv"):
        container = "tsv"
    return writer, container


def _targets(path: str | Path, writer: Writer, *, overwrite: bool) -> list[Path]:
    from trainwright.data.documents import SourceSpec
    from trainwright.data.records.parallel import is_parallel, parallel_sources

    paths = [Path(path)]
    spec = SourceSpec(str(path))
    if writer.sides:
        if not is_parallel(spec):
            raise ConfigError(f"{path}: parallel text is two files", hint="name both: out.{de,en}")
        paths = [Path(one.source) for one in parallel_sources(spec)]
    for target in paths:
        if target.exists() and not overwrite:
            raise DataError(f"{target}: exists already", hint="choose another name, or remove it first")
        if target.is_dir():
            raise DataError(f"{target}: is a folder; expected the name of a file")
        if target.suffix in (".zst", ".zstd"):
            raise ConfigError(f"{target}: zst is read, but not written", hint="name it .gz, or without compression")
    return paths


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[IO[str]]:
    """A text file that takes the name `target` once it is whole; nothing is left where writing fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(open(beside, "wb"))
            packed: Any = raw
            if target.suffix == ".gz":  # no time stamp: the same records give the same bytes
                packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
            stack.callback(text.detach)  # the bytes below are closed by their own
            yield text
            text.flush()
        with open(beside, "rb") as whole:
            os.fsync(whole.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}", hint="check the folder") from error
    finally:
        beside.unlink(missing_ok=True)


_Records = Iterable[tuple[Mapping[str, Any], str]]


def _report(policy: Policy, where: str, error: Unusable, *, hint: str | None = None) -> None:
    advice = error.hint or hint or "choose a format that holds it, or on_error: skip to leave such records out, counted"
    policy.report(error.kind, f"{where}: {error.message}", hint=advice)


def _write_document(file: IO[str], writer: Writer, records: _Records, written: Written) -> None:
    assert writer.document is not None
    fields = [item for item, _ in records]
    json.dump(writer.document(fields), file, ensure_ascii=False, indent=1)
    file.write("\n")
    written.records = len(fields)


def _write_lines(
    files: Sequence[IO[str]], writer: Writer, records: _Records, scheme: str, policy: Policy, written: Written
) -> None:
    assert writer.lines is not None
    for fields, where in records:
        try:
            text = writer.lines(fields, written.records + 1, scheme)
        except Unusable as error:
            _report(policy, where, error)
            continue
        if writer.sides:
            for file, side in zip(files, text.removesuffix("\n").split("\t"), strict=True):
                file.write(side + "\n")
        else:
            files[0].write(text)
        written.records += 1


def _rows(writer: Writer, records: _Records, policy: Policy, *, flat: bool) -> Iterator[dict[str, Any]]:
    assert writer.row is not None
    for fields, where in records:
        try:
            row = writer.row(fields)
            if writer.cells:
                row = _exactly(row, writer.cells)
            yield flat_row(row) if flat else row
        except Unusable as error:
            _report(policy, where, error)


def _exactly(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    if missing := [key for key in keys if key not in row]:
        raise Unusable("not-written", f"the record has no {missing[0]!r}")
    return {key: row[key] for key in keys}


def _write_rows(
    file: IO[str], writer: Writer, container: str, records: _Records, policy: Policy, written: Written
) -> None:
    rows = _rows(writer, records, policy, flat=container in ("csv", "tsv"))
    if container in ("csv", "tsv"):
        kept = list(rows)  # the header names every column, and only the last row tells which there are
        written.records = _write_table(file, kept, container, policy, header=not writer.cells)
        return
    for row in rows:
        if container == "json":
            file.write("[\n" if not written.records else ",\n")
        file.write(json.dumps(row, ensure_ascii=False) + ("" if container == "json" else "\n"))
        written.records += 1
    if container == "json":
        file.write("\n]\n")


def _write_table(
    file: IO[str], rows: Sequence[Mapping[str, Any]], container: str, policy: Policy, *, header: bool
) -> int:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.writer(file, lineterminator="\n")
    if header and container == "csv":
        table.writerow(names)
    elif header:
        file.write("\t".join(names) + "\n")
    count = 0
    for number, row in enumerate(rows, start=1):
        cells = ["" if row.get(name) is None else str(row[name]) for name in names]
        if container == "csv":
            table.writerow(cells)
        else:
            broken = next((cell for cell in cells if set(cell) & set("\t\n\r")), None)
            if broken is not None:
                error = Unusable("not-written", f"a value has a tab or a line break ({broken!r:.60})")
                _report(policy, f"row {number}", error, hint="write csv or jsonl, which hold them")
                continue
            file.write("\t".join(_quoted(cell) for cell in cells) + "\n")
        count += 1
    return count


def _quoted(cell: str) -> str:
    """tsv cells stand as they are, but one that is quoted as a whole would lose its quotes when read."""
    return '"' + cell.replace('"', '""') + '"' if cell.startswith('"') else cell
