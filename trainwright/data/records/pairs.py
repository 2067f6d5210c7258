"""Texts and what they become, and texts that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.tables import cells_as_fields, looks_like_cells, looks_like_rows

__all__ = ["ANCHORS", "PAIRS"]

_PAIR = SHAPES["pair"]
_ANCHORS = SHAPES["anchors"]
_TOGETHER = {1: True, "1": True, "1.0": True, "true": True, "entailment": True, "duplicate": True}
_APART = {0: False, "0": False, "0.0": False, "false": False, "contradiction": False, "neutral": False}


def _pair(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    fields: dict[str, Any] = {"source": columns.text(row, "source")}
    target = columns.find(row, "target")
    if target is not ABSENT and target is not None:
        several = target if isinstance(target, list) else [target, *_further(row, target)]
        texts = [as_text(text, "target") for text in several]
        if not texts:
            raise Unusable("missing-field", "column 'target' is an empty list; expected a text")
        fields["target"] = texts[0]
        if len(texts) > 1:
            fields["references"] = texts
    if not fields["source"].strip() or not fields.get("target", "-").strip():
        raise Unusable("empty-side", "a side of the pair is empty; expected a text on both")
    return {**fields, **columns.extras(row)}


def _further(row: Mapping[str, Any], first: Any) -> list[Any]:
    """summary2, summary3, ... behind a summary1 (DialogSum's test set)."""
    if row.get("summary1") is not first:
        return []
    names = (f"summary{number}" for number in range(2, 10))
    return [row[name] for name in names if isinstance(row.get(name), str)]


def _pairs_from_rows(opened: Opened) -> Iterator[Record]:
    columns = Columns(_PAIR, opened.options)
    yield from opened.read_each(lambda row, _: [_pair(row, columns)])


def _pairs_from_cells(opened: Opened) -> Iterator[Record]:
    columns = Columns(_PAIR, replace(opened.options, columns={}))
    for line, row in cells_as_fields(opened, ("source", "target")):
        try:
            yield opened.record(_pair(row, columns), line)
        except Unusable as error:
            opened.report(opened.where(line), error)


def _anchors(row: Mapping[str, Any], columns: Columns, opened: Opened, where: str) -> list[dict[str, Any]]:
    label = columns.find(row, "label")
    if label is not ABSENT and label is not None and not _belongs(label):
        opened.note("pair-apart", f"{where}: the label {label!r} says that the two do not belong together")
        return []
    anchor = columns.text(row, "anchor")
    positives = _texts(columns.need(row, "positive"), "positive")
    if not positives:
        raise Unusable("empty-side", "column 'positive' is an empty list; expected a text")
    found = columns.find(row, "negatives")
    negatives = [] if found is ABSENT or found is None or found == "" else _texts(found, "negatives")
    number = 1
    while isinstance(row.get(f"negative_{number}"), str):
        if row[f"negative_{number}"]:  # a table has an empty cell where a row has fewer
            negatives.append(as_text(row[f"negative_{number}"], "negatives"))
        number += 1
    made = []
    for positive in positives:
        fields: dict[str, Any] = {"anchor": anchor, "positive": positive}
        if not anchor.strip() or not positive.strip():
            raise Unusable("empty-side", "the anchor or the positive is empty; expected a text in both")
        if negatives:
            fields["negatives"] = negatives
        made.append({**fields, **columns.extras(row)})
    return made


def _belongs(label: Any) -> bool:
    key = label.strip().lower() if isinstance(label, str) else label
    if isinstance(key, (str, int, float)) and key in _TOGETHER:
        return True
    if isinstance(key, (str, int, float)) and key in _APART:
        return False
    raise Unusable(
        "bad-label",
        f"column 'label' is {describe(label)}; expected 1 where the two texts belong together, else 0",
        "for scores of similarity use the classification task with numbers as labels",
    )


def _texts(value: Any, column: str) -> list[str]:
    return [as_text(item, column) for item in (value if isinstance(value, list) else [value])]


def _anchors_from_rows(opened: Opened) -> Iterator[Record]:
    columns = Columns(_ANCHORS, opened.options)
    yield from opened.read_each(lambda row, where: _anchors(row, columns, opened, where))


def _anchors_from_cells(opened: Opened) -> Iterator[Record]:
    columns = Columns(_ANCHORS, replace(opened.options, columns={}))
    for line, row in cells_as_fields(opened, ("anchor", "positive")):
        try:
            for fields in _anchors(row, columns, opened, opened.where(line)):
                yield opened.record(fields, line)
        except Unusable as error:
            opened.report(opened.where(line), error)


_ALONE = ("text", *_ANCHORS.columns["anchor"])


def _is_alone(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    """Rows of a text and perhaps its id: a further column may be a positive by a name that is not known."""
    known = {*_ALONE, *_ANCHORS.columns["id"], str(options.columns.get("anchor", "text"))}
    return all({str(name).lower() for name in row} <= known for row in head)


def _alone(opened: Opened) -> Iterator[Record]:
    columns = Columns(_ANCHORS, opened.options)

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        anchor = as_text(columns.need(row, "anchor", _ALONE), "anchor")
        if not anchor.strip():
            raise Unusable("empty-side", "the anchor is empty; expected a text")
        return [{"anchor": anchor, **columns.extras(row)}]

    yield from opened.read_each(convert)


PAIRS: tuple[Format, ...] = (
    Format(
        "pair",
        "rows",
        "source and target (src, tgt; document, summary; dialogue, summary; article, highlights; abstract, title)",
        ("source", "target"),
        looks_like_rows(_PAIR, "source"),
        _pairs_from_rows,
    ),
    Format(
        "pair_table",
        "cells",
        "csv or tsv without a header: source, target; a column that is the same in every row is passed over",
        (),
        looks_like_cells,
        _pairs_from_cells,
    ),
)

ANCHORS: tuple[Format, ...] = (
    Format(
        "anchors",
        "rows",
        "anchor, positive, and negatives (query, pos, neg; negative_1 ...); pairs with a label keep those of label 1",
        ("anchor", "positive"),
        looks_like_rows(_ANCHORS, "anchor", "positive"),
        _anchors_from_rows,
    ),
    Format("anchor_text", "rows", "text (or anchor) alone, to predict on", ("text",), _is_alone, _alone),
    Format(
        "anchors_table",
        "cells",
        "csv or tsv without a header: anchor, positive",
        (),
        looks_like_cells,
        _anchors_from_cells,
    ),
)
