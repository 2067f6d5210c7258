"""Running text: a column of a table, or a whole text file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainwright.data.records.columns import Columns
from trainwright.data.records.opened import Format, Opened
from trainwright.data.records.record import Record, Shape, Unusable
from trainwright.data.records.tables import looks_like_rows

__all__ = ["text_formats"]


def text_formats(shape: Shape) -> tuple[Format, ...]:
    """Formats of texts that are learnt as they stand, for the shapes that take them."""

    def read(opened: Opened) -> Iterator[Record]:
        columns = Columns(shape, opened.options)

        def convert(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
            text = columns.text(row, "text")
            if not text:
                raise Unusable("empty", "column 'text' is empty")
            return [{"text": text, **columns.extras(row)}]

        yield from opened.read_each(convert)

    return (
        Format("text", "rows", "text, learnt as it stands", ("text",), looks_like_rows(shape, "text"), read),
        Format("text_file", "lines", "a text file, as one text", (), lambda *_: True, read),
    )
