"""Readers of csv and tsv, whose first line names the fields.

csv follows RFC 4180: quoted fields may hold commas, line ends and doubled quotes. Where the first line has no comma its
semicolons, or else its tabs, stand between the fields, as spreadsheets of many countries write them. tsv is one line
per row, because real tsv files carry stray double quotes that would swallow the lines behind them; a field that is
quoted as a whole, as pandas and spreadsheets write it, is unquoted.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from trainwright.base.errors import DataError
from trainwright.data.compression import DamagedFileError, open_binary
from trainwright.data.documents import Policy, Row, Shard, fields_seen
from trainwright.data.formats import decoded_lines

__all__ = ["read_cells", "read_delimited"]

_FIELD_LIMIT = 2**31 - 1  # the module's default of 128 KiB refuses ordinary web pages


def read_delimited(shard: Shard, policy: Policy, text_field: str | None) -> Iterator[Row]:
    """The rows of a csv or tsv file. Raises DataError when the header lacks `text_field` (None: any header will do)."""
    header: list[str] | None = None
    for line, values in read_cells(shard, policy):
        if header is None:
            header = _checked_header(values, shard, text_field)
            continue
        where = f"{shard.url}:{line}"
        if len(values) != len(header):
            message = f"{where}: {len(values)} fields; {fields_seen('', header).replace('it', 'the header', 1)}"
            policy.report("wrong-field-count", message)
            continue
        yield Row(dict(zip(header, values, strict=True)), where, f"{shard.key}:{line}")


def read_cells(shard: Shard, policy: Policy) -> Iterator[tuple[int, list[str]]]:
    """(line on which a row begins, its cells), the header's row too, for files that may have none."""
    csv.field_size_limit(_FIELD_LIMIT)
    with open_binary(shard.url, shard.compression) as stream:
        lines = _LineFeed(decoded_lines(stream, shard, policy))
        if shard.format == "csv":
            yield from _csv_records(lines, shard, policy)
            return
        expected = 0
        for line, values in _tsv_records(lines):
            expected = expected or len(values)
            yield line, _unquoted(values, expected)


def _checked_header(names: list[str], shard: Shard, text_field: str | None) -> list[str]:
    header = [name.strip().removeprefix('"').removesuffix('"') for name in names]
    if len(set(header)) != len(header):
        raise DataError(f"{shard.url}:1: the header names a field twice; {fields_seen('', header)}", hint="rename one")
    if text_field is not None and text_field not in header:
        raise DataError(
            f"{shard.url}:1: no field {text_field!r} in the header; {fields_seen(text_field, header)}",
            hint="set text_field to one of them; a csv or tsv file begins with a line of field names",
        )
    return header


def _csv_records(lines: _LineFeed, shard: Shard, policy: Policy) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record begins, its values)."""
    reader = csv.reader(lines, delimiter=_delimiter(lines.first()), strict=True)
    while True:
        first = lines.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if first == 1:
                raise DamagedFileError(f"{shard.url}:1: the header is not valid csv: {error}") from error
            hint = f'check the double quotes from line {first} on: inside a quoted field a quote is written ""'
            policy.report("bad-quoting", f"{shard.url}:{first}: not valid csv: {error}", hint=hint)
            continue
        if values:
            yield first, values


def _delimiter(first_line: str) -> str:
    """What stands between the fields of a csv file."""
    return next((mark for mark in ",;\t" if mark in first_line), ",")


def _tsv_records(lines: _LineFeed) -> Iterator[tuple[int, list[str]]]:
    for line in lines:
        bare = line.removesuffix("\n").removesuffix("\r")
        if bare:
            yield lines.number, bare.split("\t")


def _unquoted(values: list[str], expected: int) -> list[str]:
    """Fields quoted as a whole lose their quotes; a line with too many fields may hide tabs inside quotes."""
    if not any(value.startswith('"') for value in values):
        return values
    if len(values) != expected:
        try:
            return next(csv.reader(["\t".join(values)], delimiter="\t", strict=True))
        except csv.Error:
            return values
    return [_unquote(value) for value in values]


def _unquote(value: str) -> str:
    if len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
        return value
    inner = value[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else value


class _LineFeed:
    """Feeds lines and remembers how far it has come, for error positions."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._waiting: tuple[int, str] | None = None
        self.number = 0

    def first(self) -> str:
        """The first line, before any was taken; "" of an empty file."""
        self._waiting = next(self._lines, None)
        return "" if self._waiting is None else self._waiting[1]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        (self.number, line), self._waiting = self._waiting or next(self._lines), None
        return line
