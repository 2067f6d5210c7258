"""From files to records: the format of each file is found, or taken as it was named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.data.documents import OnError, Policy, Problems, Shard, SourceSpec, fields_seen
from trainwright.data.records.columns import Columns, check_columns, check_unicode, suggestion
from trainwright.data.records.formats import CONTAINERS, FORMATS
from trainwright.data.records.opened import Format, Opened, Options, checked_encoding, naming_encoding
from trainwright.data.records.parallel import is_parallel, read_parallel
from trainwright.data.records.record import SHAPES, Record, Shape, Unusable
from trainwright.data.records.tables import has_header
from trainwright.data.sources import list_shards

__all__ = ["detect_format", "read_file", "read_records"]

_HEAD_ROWS = 20
_HEAD_LINES = 200


def read_records(
    source: SourceSpec | Sequence[SourceSpec],
    shape: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str | int] | None = None,
    encoding: str = "utf-8",
    separator: str | None = None,
    names: Sequence[str] = (),
    scheme: str = "auto",
    optional: Sequence[str] = (),
    answers: bool = True,
    on_error: OnError = "stop",
    problems: Problems | None = None,
) -> Iterator[Record]:
    """The records of one source or several, in the order of their files, as dicts of the shape's keys.

    Args:
        shape: a key of SHAPES.
        format: a format of the shape (FORMATS), a container (csv, tsv, json, jsonl), or "auto".
        columns: {key of the shape: column of the file}; numbers from 0 where a table has no header.
        encoding: of text files.
        separator: labels are lists, written with this between two.
        names: of labels or tags that the file writes as numbers.
        scheme: of tags (`tags.SCHEMES`), or "auto" to find it over each file.
        optional: keys of `columns` that are looked for by their usual names where a file lacks the named column.
        answers: False passes over what is learnt (`Shape.answers`), for records that are only predicted for: it may be
            missing, and whatever stands there is no problem.
        on_error: "skip" leaves bad records out and counts them in `problems`; "stop" raises DataError at the first.

    Raises ConfigError for arguments that the shape does not have, DataError for files of no known format.
    """
    read_as = checked_encoding(encoding)
    options = Options(format, dict(columns or {}), read_as, separator, tuple(names), scheme, tuple(optional), answers)
    shaped = _checked(shape, options)
    if on_error not in ("stop", "skip"):
        raise ConfigError(f"on_error is {on_error!r}; expected 'stop' or 'skip'")
    policy = Policy(on_error, problems if problems is not None else Problems())
    return _read_all([source] if isinstance(source, SourceSpec) else list(source), shaped, options, policy)


def _read_all(sources: Sequence[SourceSpec], shape: Shape, options: Options, policy: Policy) -> Iterator[Record]:
    for spec in sources:
        if shape.name == "pair" and is_parallel(spec):
            yield from read_parallel(spec, shape, options, policy)
            continue
        for shard in list_shards(spec):
            yield from read_file(shard, shape, options, policy)


def _checked(shape: str, options: Options) -> Shape:
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r}; expected one of {', '.join(SHAPES)}.{did_you_mean(shape, SHAPES)}")
    known = FORMATS[shape]
    if options.format not in ("auto", *known, *CONTAINERS):
        elsewhere = [name for name, formats in FORMATS.items() if options.format in formats]
        note = f" ({options.format} is a format of {', '.join(elsewhere)})" if elsewhere else ""
        raise ConfigError(
            f"data.format is {options.format!r}{note}; {SHAPES[shape].what} ({shape}) is read from "
            f"{', '.join(known)}, or a container {', '.join(CONTAINERS)}."
            f"{did_you_mean(options.format, (*known, *CONTAINERS))}",
            hint="leave data.format out: the format is found by the columns of the file",
        )
    check_columns(options.columns, SHAPES[shape])
    return SHAPES[shape]


def read_file(shard: Shard, shape: Shape, options: Options, policy: Policy) -> Iterator[Record]:
    """The records of one file."""
    shard = replace(shard, encoding=options.encoding)
    before = policy.problems.total
    empty = True
    with naming_encoding(shard):
        opened, chosen = _choose(Opened(shard, shape, options, policy))
        if chosen is not None:
            for record in chosen.read(opened):
                try:
                    check_unicode(record.fields, "the record")
                except Unusable as error:
                    opened.report(record.where, error)
                    continue
                empty = False
                yield record
        else:
            for _ in opened.rows() if opened.shard.format != "text" else opened.lines():
                pass  # nothing could be looked at: this reading reports what is wrong
    if empty and policy.problems.total == before:
        policy.note_empty(shard.url)


def detect_format(shard: Shard, shape: str, columns: Mapping[str, str | int] | None = None) -> str:
    """The name of the format in which a file holds records of the shape. Raises DataError where it is none."""
    options = Options(columns=dict(columns or {}))
    shaped = _checked(shape, options)
    _, chosen = _choose(Opened(shard, shaped, options, Policy("skip", Problems())))
    if chosen is None:
        raise DataError(f"{shard.url}: holds nothing to tell a format by")
    return chosen.name


def _choose(opened: Opened) -> tuple[Opened, Format | None]:
    """The file as it is to be opened, and its format; None when there is nothing in it to look at."""
    options = opened.options
    formats = FORMATS[opened.shape.name]
    named = formats.get(options.format)
    if options.format in CONTAINERS:
        opened = replace(opened, shard=replace(opened.shard, format=options.format))
    elif opened.shard.format == "text":
        table = named is not None and named.level == "cells"
        opened = replace(opened, shard=replace(opened.shard, format="tsv" if table else _sniffed(opened)))
    if named is not None and named.level == "lines":
        return opened, named
    # a table of words and tags is a CoNLL file, and SemEval's sentences are numbered; others are told by their columns
    lined = opened.shape.name in ("tagged", "relation")
    tabular = opened.shard.format == "tsv" and options.format == "auto" and lined
    if opened.shard.format == "text" or tabular:
        found = _by_lines(opened, named)
        if found is not None or opened.shard.format == "text":
            return opened, found
    if opened.shard.format in ("csv", "tsv"):
        head = next(((line, cells) for line, cells in opened.quietly().cells()), None)
        if head is None:
            return opened, None
        bare = not has_header(head[1], opened.shape, options)
        if bare or (named is not None and named.level == "cells"):
            return opened, _by_cells(opened, named, head[1])
    return opened, named or _by_rows(opened)


def _sniffed(opened: Opened) -> str:
    """What a file of an ending that says nothing holds: jsonl, json, a table with tabs, or text."""
    lines = [line for _, line in islice(opened.quietly().lines(), _HEAD_LINES) if line.strip()]
    if not lines:
        return "text"
    first = lines[0].lstrip()
    if first.startswith("{") and _is_object(first):
        return "jsonl"
    if re.match(r"[\[{]\s*$|\[\s*[{\[\"]", first):
        return "json"
    tabs = {line.count("\t") for line in lines}
    if len(tabs) == 1 and tabs != {0} and opened.shape.name != "text":
        return "tsv"
    return "text"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_level(opened: Opened, level: str) -> list[Format]:
    return [one for one in FORMATS[opened.shape.name].values() if one.level == level]


def _by_lines(opened: Opened, named: Format | None) -> Format | None:
    """A format of lines that the file looks like. Raises DataError for a text file that looks like none."""
    head = [line for _, line in islice(opened.quietly().lines(), _HEAD_LINES)]
    filled = [line for line in head if line.strip()]
    if not filled:
        return None
    for one in _of_level(opened, "lines"):
        if one.matches(head if one.name == "conll" else filled, opened.options):
            return one
    if opened.shard.format != "text":
        return None
    what = f"{opened.shard.url}: the first line is {filled[0]!r:.80}"
    raise DataError(f"{what}; expected {_expected(opened.shape)}", hint=_fix(opened.shape))


def _by_cells(opened: Opened, named: Format | None, first: Sequence[str]) -> Format:
    if named is not None:
        return named
    for one in _of_level(opened, "cells"):
        if one.matches([list(first)], opened.options):
            return one
    raise DataError(
        f"{opened.shard.url}:1: the first row is {', '.join(first)!r:.80}; expected {_expected(opened.shape)}",
        hint=f"name the columns in the first row, or write data.columns: {{{_key(opened.shape)}: ...}}",
    )


def _by_rows(opened: Opened) -> Format | None:
    head = list(islice(opened.quietly().rows(), _HEAD_ROWS))
    rows: list[Mapping[str, Any]] = [row.fields for row in head if isinstance(row.fields, Mapping)]
    if not rows:
        return None
    for one in _of_level(opened, "rows"):
        if one.matches(rows, opened.options):
            _refuse_misspelt(opened, rows, head[0].where)
            return one
    _refuse_missing(opened, rows[0], head[0].where)
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    nearest = _nearest(opened.shape, rows)
    raise DataError(
        f"{head[0].where}: {fields_seen('', names)}; expected {_expected(opened.shape)}"
        + (f"; these columns are {nearest.name}, which is {nearest.what}" if nearest else ""),
        hint=f"give the file to a task for {nearest.shape}, or " + _fix(opened.shape, rows[0])
        if nearest
        else _fix(opened.shape, rows[0]),
    )


def _refuse_missing(opened: Opened, row: Mapping[str, Any], where: str) -> None:
    """A column that a person named and the file has not is the reason why nothing matched."""
    columns = Columns(opened.shape, opened.options)
    for key in opened.options.columns:
        try:
            columns.find(row, key)
        except Unusable as error:
            raise DataError(f"{where}: {error.message}", hint=error.hint) from error


def _refuse_misspelt(opened: Opened, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Records may lack what is learnt, to be predicted on; a column that is nearly named so is a slip, though."""
    key, columns = opened.shape.target, Columns(opened.shape, opened.options)
    if key is None or not columns.reads(key) or any(columns.has(row, key) for row in rows):
        return
    known = {name for names in opened.shape.columns.values() for name in names} | set(opened.options.columns.values())
    for name in rows[0]:
        close = get_close_matches(str(name).lower(), opened.shape.columns[key], n=1, cutoff=0.8)
        if close and name not in known:
            raise DataError(
                f"{where}: no column for {key!r}, and one that is named {name!r}; did you mean {close[0]!r}?",
                hint=f"write data.columns: {{{key}: {name}}}, or rename the column",
            )


def _expected(shape: Shape) -> str:
    told = [f"{one.name} ({', '.join(one.keys)})" if one.keys else one.name for one in FORMATS[shape.name].values()]
    return f"{shape.what} as one of: {', '.join(told)}"


@dataclass(frozen=True)
class _Nearest:
    name: str
    shape: str
    what: str


def _nearest(shape: Shape, rows: Sequence[Mapping[str, Any]]) -> _Nearest | None:
    """The format of another shape that these rows are, the one with most columns."""
    fitting = [
        (len(one.keys), _Nearest(one.name, f"{SHAPES[name].what} ({name})", one.what))
        for name, formats in FORMATS.items()
        if name not in ("text", shape.name)
        for one in formats.values()
        if one.level == "rows" and len(one.keys) > 1 and one.matches(rows, Options())
    ]
    return max(fitting, key=lambda item: item[0])[1] if fitting else None


def _key(shape: Shape) -> str:
    """The column of the shape that matters first."""
    return next(key for key in shape.needs if key != "id")


def _fix(shape: Shape, row: Mapping[str, Any] | None = None) -> str:
    if row is None:
        lined = [one.name for one in FORMATS[shape.name].values() if one.level == "lines"]
        if shape.name == "pair":
            return "name both files (train.{de,en}), or say what the file is: data.format: tsv, jsonl, json or csv"
        return f"say what it is: data.format: {' or '.join(lined or CONTAINERS)}"
    columns = Columns(shape, Options())
    missing = next((key for key in shape.needs if key != "id" and not columns.has(row, key)), _key(shape))
    return suggestion(missing, row, *shape.columns.get(missing, ()))
