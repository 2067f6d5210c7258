"""Tables: whether a csv or tsv file has a header, and which cell is which column where it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.records.columns import Columns
from trainwright.data.records.opened import Opened, Options
from trainwright.data.records.record import Shape, Unusable

__all__ = ["cells_as_fields", "has_header", "looks_like_cells", "looks_like_rows"]

_HEAD = 200
_LABEL_LENGTH = 40  # characters; names of classes are shorter, and have no spaces in files without a header


def looks_like_rows(shape: Shape, *keys: str) -> Callable[[Sequence[Mapping[str, Any]], Options], bool]:
    """A `Format.matches` for rows that have these columns, but for those that are not read."""

    def matches(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
        columns = Columns(shape, options)
        return any(columns.has(row, *filter(columns.reads, keys)) for row in head)

    return matches


def looks_like_cells(head: Sequence[Sequence[str]], options: Options) -> bool:
    """A `Format.matches` for tables without a header: two columns, or one where answers are not read."""
    return not options.answers or any(len(cells) > 1 for cells in head)


def has_header(cells: Sequence[str], shape: Shape, options: Options) -> bool:
    """Whether the first row names columns: one of them is a name that the shape or `data.columns` knows."""
    known = {name for names in shape.columns.values() for name in names}
    given = {str(name) for name in options.columns.values() if not str(name).isdecimal()}
    return any(cell.strip().lower() in known or cell.strip() in given for cell in cells)


def cells_as_fields(opened: Opened, order: tuple[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, columns by name) of a table without a header.

    `data.columns` gives the numbers of the cells from 0. Without it a table of two columns is understood: of (text,
    label) the label is the column of short words; of (source, target) the source comes first.
    """
    places = _given(opened) or _understood(opened, order)
    width = max(places.values()) + 1
    for line, cells in opened.cells():
        if len(cells) < width:
            error = Unusable(
                "wrong-field-count",
                f"{len(cells)} columns; expected at least {width}, since {_said(places)}",
                "write data.columns with the numbers of the columns, counted from 0",
            )
            opened.report(opened.where(line), error)
            continue
        yield line, {key: cells[place] for key, place in places.items()}


def _said(places: Mapping[str, int]) -> str:
    return ", ".join(f"{key} is column {place}" for key, place in places.items())


def _given(opened: Opened) -> dict[str, int]:
    places = {}
    columns = Columns(opened.shape, opened.options)
    for key, place in opened.options.columns.items():
        named = not str(place).isdecimal()
        if not columns.reads(key) or (named and key in opened.options.optional):
            continue
        if named:
            raise DataError(
                f"{opened.shard.url}:1: no column {place!r}: the file has no header that names it",
                hint=f"count the columns from 0: data.columns: {{{key}: 0}}",
            )
        places[key] = int(place)
    return places


def _understood(opened: Opened, order: tuple[str, str]) -> dict[str, int]:
    head = [cells for _, cells in islice(opened.quietly().cells(), _HEAD)]
    fix = f"write data.columns: {{{order[0]}: 0, {order[1]}: 1}} with the right numbers, counted from 0"
    widths = {len(cells) for cells in head}
    if len(head) > 1 and len(widths) == 1:
        telling = [place for place in range(len(head[0])) if len({cells[place] for cells in head}) > 1]
        if len(telling) == 2 and len(head[0]) > 2:  # `to title<TAB>abstract<TAB>title` (CSL): the rest never changes
            return _roles([[cells[place] for place in telling] for cells in head], telling, opened, order)
    if widths == {1} and not opened.options.answers:
        return {order[0]: 0}
    if widths != {2}:
        seen = ", ".join(str(width) for width in sorted(widths))
        raise DataError(
            f"{opened.shard.url}:1: a table of {seen} columns without a header that names {order[0]!r} "
            f"(the first row is {head[0]!r:.80}); expected two columns, or a header",
            hint=fix,
        )
    return _roles(head, [0, 1], opened, order)


def _roles(
    head: Sequence[Sequence[str]], places: Sequence[int], opened: Opened, order: tuple[str, str]
) -> dict[str, int]:
    """Which of two columns, that stand at `places`, is which."""
    fix = f"write data.columns: {{{order[0]}: 0, {order[1]}: 1}} with the right numbers, counted from 0"
    if order[1] != "label":
        return {order[0]: places[0], order[1]: places[1]}
    labels = [place for place in (0, 1) if _are_labels([cells[place] for cells in head])]
    if len(labels) != 1:
        raise DataError(
            f"{opened.shard.url}:1: which of the two columns is the label cannot be told (the first row is "
            f"{head[0]!r:.80}); expected a text and a short label",
            hint=fix,
        )
    place = labels[0]
    rest = [cells[place] for cells in head[1:]]
    if rest and head[0][place] not in rest and len(set(rest)) < len(rest):
        raise DataError(
            f"{opened.shard.url}:1: {head[0]!r:.80} looks like a header of unknown names, or like a class that is "
            "seen once",
            hint=f"write data.columns: {{{order[0]}: {head[0][1 - place]}, label: {head[0][place]}}} for a header, or "
            f"data.columns: {{{order[0]}: {places[1 - place]}, label: {places[place]}}} where there is none",
        )
    return {order[0]: places[1 - place], order[1]: places[place]}


def _are_labels(cells: Sequence[str]) -> bool:
    short = all(len(cell) <= _LABEL_LENGTH and not any(c.isspace() for c in cell) for cell in cells)
    return short and (len(cells) < 4 or len(set(cells)) <= len(cells) / 2)
