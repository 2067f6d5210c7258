"""Texts with labels: tables with and without a header, `label text` lines (Kim 2014), fastText and TREC."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.tables import cells_as_fields, looks_like_cells, looks_like_rows

__all__ = ["LABELLED"]

_SHAPE = SHAPES["labelled"]
_HEAD = 200  # rows that decide whether labels are numbers
_NUMBER = re.compile(r"-?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")
_TREC = re.compile(r"([A-Z][A-Z_]*):(\w+)\s+(\S.*)")
_FASTTEXT = "__label__"


def _label(value: Any, options: Options, *, numeric: bool = False) -> Any:
    """A name, a number, or a list of names; ABSENT where there is none."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, list):
        return [_name(item, options) for item in value]
    if isinstance(value, str):
        if options.separator is not None:
            return [_name(part.strip(), options) for part in value.split(options.separator) if part.strip()]
        if value.startswith("[") and value.endswith("]"):
            return [_name(item, options) for item in _listed(value)]
        if numeric:
            return _number(value)
        return _name(value, options)
    if isinstance(value, float) or (numeric and isinstance(value, int)):
        return _finite(value)
    return _name(value, options)


def _listed(value: str) -> list[Any]:
    """The items of a list that a cell of a table holds, written as JSON or as Python."""
    for parse in (json.loads, ast.literal_eval):
        try:
            items = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, list):
            return items
    raise Unusable("bad-label", f'column \'label\' is {value!r:.60}; expected a name or a list such as ["a", "b"]')


def _name(value: Any, options: Options) -> str:
    """The name of a class; integers are looked up where names were given."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        if isinstance(value, bool):
            return str(value).lower()
        raise Unusable(
            "bad-label", f"column 'label' is {describe(value)}; expected a name, a number or a list of names"
        )
    text = as_text(value, "label") if isinstance(value, str) else str(value)
    if options.names and re.fullmatch(r"\d+", text):
        if int(text) >= len(options.names):
            raise Unusable(
                "bad-label",
                f"column 'label' is {text}; there are {len(options.names)} names, for 0 to {len(options.names) - 1}",
            )
        return options.names[int(text)]
    return text


def _number(value: str) -> float:
    if _NUMBER.fullmatch(value.strip()) is None:
        raise Unusable("bad-label", f"column 'label' is {value!r:.60}; the labels before it are numbers")
    return _finite(value)


def _finite(value: float | str) -> float:
    """A label that is a quantity."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unusable("bad-label", f"column 'label' is {value!r:.60}; expected a finite number")
    return number


def _are_numbers(labels: Sequence[Any], options: Options) -> bool:
    """Whether labels are quantities: all are numbers, and some are written with a point or an exponent."""
    known = [label for label in labels if label is not None and label is not ABSENT and label != ""]
    if not known or options.names or options.separator is not None:
        return False
    if any(isinstance(label, float) for label in known):
        return all(isinstance(label, (int, float)) for label in known)
    if not all(isinstance(label, str) and _NUMBER.fullmatch(label.strip()) for label in known):
        return False
    return any(not label.strip().lstrip("-").isdigit() for label in known)


def _fields(row: Mapping[str, Any], columns: Columns, options: Options, *, numeric: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": columns.text(row, "text")}
    second = columns.find(row, "text2")
    if second is not ABSENT:
        fields["text2"] = as_text(second, "text2")
    found = columns.find(row, "label")
    label = ABSENT if found is ABSENT else _label(found, options, numeric=numeric)
    if label is not ABSENT and not (isinstance(found, int) and found == -1):  # GLUE writes -1 for "hidden"
        fields["label"] = label
    return {**fields, **columns.extras(row)}


def _from_rows(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)
    head = [row.fields for row in islice(opened.quietly().rows(), _HEAD)]
    numeric = _numeric_head(head, columns, opened.options)
    yield from opened.read_each(lambda row, _: [_fields(row, columns, opened.options, numeric=numeric)])


def _numeric_head(head: Sequence[Any], columns: Columns, options: Options) -> bool:
    return _are_numbers([columns.find(row, "label") for row in head if columns.has(row, "label")], options)


def _from_cells(opened: Opened) -> Iterator[Record]:
    options = opened.options
    columns = Columns(_SHAPE, replace(opened.options, columns={}))
    rows = cells_as_fields(opened.quietly(), ("text", "label"))
    numeric = _numeric_head([row for _, row in islice(rows, _HEAD)], columns, options)
    for line, row in cells_as_fields(opened, ("text", "label")):
        try:
            yield opened.record(_fields(row, columns, options, numeric=numeric), line)
        except Unusable as error:
            opened.report(opened.where(line), error)


def _from_lines(parse: Callable[[str, Options], dict[str, Any]]) -> Callable[[Opened], Iterator[Record]]:
    def read(opened: Opened) -> Iterator[Record]:
        options = opened.options if opened.options.answers else replace(opened.options, names=())
        for number, line in opened.lines():
            if not line.strip():
                continue
            try:
                yield opened.record(parse(line, options), number)
            except Unusable as error:
                opened.report(opened.where(number), error)

    return read


def _label_text(line: str, options: Options) -> dict[str, Any]:
    label, _, text = line.strip(" \t").partition(" ")
    if not text.strip():
        raise Unusable("missing-field", f"only the label {label!r:.40}; expected a label, a space and a text")
    return {"text": text.strip(" \t"), "label": _name(label, options)}


def _fasttext(line: str, options: Options) -> dict[str, Any]:
    labels = []
    rest = line.strip()
    while rest.startswith(_FASTTEXT):
        label, _, rest = rest.partition(" ")
        labels.append(_name(label.removeprefix(_FASTTEXT), options))
        rest = rest.lstrip(" ,")
    if not rest or not labels:
        raise Unusable("missing-field", f"{line!r:.60}; expected {_FASTTEXT}name and a text")
    return {"text": rest, "label": labels if len(labels) > 1 else labels[0]}


def _trec(fine: bool) -> Callable[[str, Options], dict[str, Any]]:
    def parse(line: str, options: Options) -> dict[str, Any]:
        match = _TREC.fullmatch(line.strip(" \t"))
        if match is None:
            raise Unusable("missing-field", f"{line!r:.60}; expected COARSE:fine and a text")
        coarse, detail, text = match.groups()
        return {"text": text, "label": f"{coarse}:{detail}" if fine else coarse}

    return parse


def _all(pattern: re.Pattern[str]) -> Callable[[Sequence[Any], Options], bool]:
    return lambda head, _: all(pattern.match(line) for line in head)


LABELLED: tuple[Format, ...] = (
    Format(
        "labelled",
        "rows",
        "named columns: text, perhaps text2, and label (a name, a number, or a list)",
        ("text", "label"),
        looks_like_rows(_SHAPE, "text"),
        _from_rows,
    ),
    Format(
        "labelled_table",
        "cells",
        "csv or tsv without a header: the text and its label",
        (),
        looks_like_cells,
        _from_cells,
    ),
    Format(
        "fasttext",
        "lines",
        "`__label__name text` lines; several labels make a list",
        (),
        _all(re.compile(re.escape(_FASTTEXT))),
        _from_lines(_fasttext),
    ),
    Format("trec", "lines", "`COARSE:fine text` lines, the coarse class", (), _all(_TREC), _from_lines(_trec(False))),
    Format("trec_fine", "lines", "the same, with both classes", (), lambda *_: False, _from_lines(_trec(True))),
    Format(
        "label_text",
        "lines",
        "`label text` lines (Kim 2014); found by itself where the labels are whole numbers",
        (),
        _all(re.compile(r"-?\d+ +\S")),
        _from_lines(_label_text),
    ),
)
