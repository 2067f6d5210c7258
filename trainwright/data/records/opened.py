"""A file that is read as records: its rows, lines or cells, and where its problems go."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.data.compression import DamagedFileError, open_binary
from trainwright.data.delimited import read_cells
from trainwright.data.documents import Policy, Problems, Row, Shard
from trainwright.data.formats import decoded_lines
from trainwright.data.readers import read_rows
from trainwright.data.records.record import Record, Shape, Unusable

__all__ = ["Format", "Opened", "Options", "checked_encoding", "naming_encoding"]

_ENCODINGS = ("utf-8", "latin-1", "cp1252", "gb18030", "big5", "shift_jis", "euc-jp", "euc-kr", "cp1251", "koi8-r")
_NOT_UTF8 = "invalid UTF-8 at byte"  # what the readers of text formats say
_SAMPLE = 1 << 20  # bytes that are looked at to name the encoding of a file


@dataclass(frozen=True)
class Options:
    """How files are read; the fields are the arguments of `read_records`."""

    format: str = "auto"
    columns: Mapping[str, str | int] = field(default_factory=dict)
    encoding: str = "utf-8"
    separator: str | None = None
    names: tuple[str, ...] = ()
    scheme: str = "auto"
    optional: tuple[str, ...] = ()
    answers: bool = True


@dataclass(frozen=True)
class Format:
    """One way in which records of a shape are written.

    Attributes:
        level: what it is recognised by and made of: "rows" with named columns (jsonl, json, csv with a header, Parquet,
            ...), "cells" of a table without a header, or "lines" of text.
        what: for people.
        keys: columns that it is told by, for messages about files that are of no known format.
        matches: whether the first rows (mappings), cells (lists) or lines (strings) look like it.
        read: the records of a file.
    """

    name: str
    level: str
    what: str
    keys: tuple[str, ...]
    matches: Callable[[Sequence[Any], Options], bool]
    read: Callable[[Opened], Iterator[Record]]


@dataclass(frozen=True)
class Opened:
    """One file, and how it is read."""

    shard: Shard
    shape: Shape
    options: Options
    policy: Policy

    def rows(self) -> Iterator[Row]:
        """Rows with named columns; rows that are a bare text have it as their column `text`."""
        for row in read_rows(self.shard, on_error=self.policy.on_error, problems=self.policy.problems):
            yield Row({"text": row.fields}, row.where, row.key) if isinstance(row.fields, str) else row

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number, line without its ending). Only line feeds end lines: latin-1 texts hold other separators."""
        return self._guarded(self._lines())

    def cells(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the line, cells of a row) of a table, the first row too."""
        return self._guarded(read_cells(self.shard, self.policy))

    def _lines(self) -> Iterator[tuple[int, str]]:
        with open_binary(self.shard.url, self.shard.compression) as stream:
            for number, line in decoded_lines(stream, self.shard, self.policy):
                yield number, line.removesuffix("\n").removesuffix("\r")

    def _guarded(self, items: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Damage ends the file under "skip" and the run under "stop", as for rows."""
        try:
            yield from items
        except DamagedFileError as error:
            if self.policy.on_error == "stop":
                raise
            self.policy.problems.add("damaged-file", error.message)

    def where(self, line: int) -> str:
        return f"{self.shard.url}:{line}"

    def record(self, fields: Mapping[str, Any], line: int) -> Record:
        """A record that begins on a line."""
        return Record(fields, self.where(line), f"{self.shard.key}:{line}")

    def report(self, where: str, error: Unusable) -> None:
        """A record that cannot be used: counted, or the end of reading."""
        self.policy.report(error.kind, f"{where}: {error.message}", hint=error.hint)

    def note(self, kind: str, message: str, count: int = 1) -> None:
        """Something that was mended: counted under any policy."""
        for _ in range(count):
            self.policy.problems.add(kind, message)

    def quietly(self) -> Opened:
        """The same file for a look at it: problems are left for the reading that follows."""
        return replace(self, policy=Policy("skip", Problems()))

    def read_each(self, convert: Callable[[Mapping[str, Any], str], Iterable[Mapping[str, Any]]]) -> Iterator[Record]:
        """Records that `convert` makes of each row and its place; it raises Unusable where it cannot."""
        for row in self.rows():
            assert not isinstance(row.fields, str)  # rows() gives mappings only
            try:
                made = list(convert(row.fields, row.where))
            except Unusable as error:
                self.report(row.where, error)
                continue
            for number, fields in enumerate(made):
                several = f"/{number + 1}" if len(made) > 1 else ""
                yield Record(fields, row.where, row.key + several)


def checked_encoding(name: str) -> str:
    """Python's name of an encoding whose line ends are those of ASCII. Raises ConfigError."""
    try:
        found = codecs.lookup(name).name
        wide = "\n".encode(found) != b"\n"
    except (LookupError, UnicodeError) as error:
        raise ConfigError(
            f"encoding is {name!r}; expected one of {', '.join(_ENCODINGS)}, or another that Python knows."
            f"{did_you_mean(name, _ENCODINGS)}"
        ) from error
    if wide:
        raise ConfigError(f"encoding {name!r} cannot be read", hint=f"convert the file: iconv -f {name} -t UTF-8")
    return found


@contextlib.contextmanager
def naming_encoding(shard: Shard) -> Iterator[None]:
    """Adds to the error of a file that is not UTF-8 in which encoding it seems to be written."""
    try:
        yield
    except DataError as error:
        ours = error.message.startswith(shard.url) and _NOT_UTF8 in error.message and shard.encoding == "utf-8"
        if not ours:
            raise
        guess = _guess_encoding(shard)
        raise DataError(
            f"{error.message}; the file looks like {guess}",
            hint=f"write data.encoding: {guess}, or convert the file (iconv -f {guess} -t UTF-8)",
        ) from error


def _guess_encoding(shard: Shard) -> str:
    """By what the bytes would say: text that is decoded as it was written is mostly of everyday characters."""
    with open_binary(shard.url, shard.compression) as stream:
        sample = stream.read(_SAMPLE)
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    scores = {name: _everyday(sample, name, *ranges) for name, ranges in _SCRIPTS.items()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > 0.6:
        return best
    try:
        sample.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in sample) else "latin-1"


_SCRIPTS = {
    "gb18030": ((0xB0, 0xD7), (0xA1, 0xFE)),  # level 1 of GB 2312: 3,755 everyday characters
    "big5": ((0xA4, 0xC6), (0x40, 0xFE)),  # level 1 of Big5: 5,401
    "shift_jis": ((0x82, 0x83), (0x40, 0xF1)),  # kana
    "euc-kr": ((0xB0, 0xC8), (0xA1, 0xFE)),  # Hangul
}
"""First and second bytes of everyday characters."""


def _everyday(sample: bytes, encoding: str, first: tuple[int, int], second: tuple[int, int]) -> float:
    """Share of the characters beyond ASCII that are everyday ones; 0 where the bytes are not of the encoding."""
    try:
        text = sample.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    high = [code for character in text if ord(character) > 127 and len(code := character.encode(encoding)) == 2]
    good = sum(1 for code in high if first[0] <= code[0] <= first[1] and second[0] <= code[1] <= second[1])
    share = good / len(high) if high else 0.0
    if encoding == "shift_jis":
        share = 0.99 if share > 0.2 else 0.0  # Japanese text is a third to a half kana
    if encoding == "euc-kr":
        hangul = sum(1 for character in text if "\uac00" <= character <= "\ud7a3")
        share = share if hangul and _parted(text) else 0.0
    return share


def _parted(text: str) -> bool:
    """Korean parts its words by spaces, and Chinese, which has the same bytes, does not."""
    return text.count(" ") > 0.1 * sum(1 for character in text if ord(character) > 127)
