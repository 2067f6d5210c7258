"""Columns as options of a command, and hints in the words of its options."""

from __future__ import annotations

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.cli.columns import columns_of, told_by_options

OPTIONS = {"columns": "--column", "encoding": "--encoding", "names": "--names", "on_error": "--on-error"}


def test_columns_are_pairs() -> None:
    assert columns_of(None) == {}
    assert columns_of(["text=评论", "label=a=b"]) == {"text": "评论", "label": "a=b"}
    for wrong in ("text", "text=", "=a"):
        with pytest.raises(ConfigError, match="expected KEY=COLUMN"):
            columns_of(["label=b", wrong])


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("write data.columns: {text: 评论}", "give --column text=评论"),
        (
            "write data.columns: {text: 0, label: 1} with the right numbers, counted from 0",
            "give --column text=0 --column label=1 with the right numbers, counted from 0",
        ),
        (
            "name another column: data.columns: {text: ...}, or mend the data",
            "name another column: --column text=..., or mend the data",
        ),
        ("write data.encoding: latin-1, or convert the file", "give --encoding latin-1, or convert the file"),
        ("give the names in order: data.names: [O, B-PER, ...]", "give the names in order: --names O,B-PER,..."),
        ("mend them, or set data.on_error: skip to go on", "mend them, or give --on-error skip to go on"),
        ("write data.scheme: iob1", "write data.scheme: iob1"),
        (None, None),
    ],
)
def test_hints_name_options(hint: str | None, told: str | None) -> None:
    with pytest.raises(DataError, match="no column") as caught, told_by_options(OPTIONS):
        raise DataError("a.jsonl:1: no column", hint=hint)
    assert caught.value.hint == told


def test_what_a_command_cannot_do_is_not_advised() -> None:
    advice = "mend the data, or set data.on_error: skip to leave such parts out and count them"
    with pytest.raises(DataError) as caught, told_by_options({"columns": "--column"}):
        raise DataError("a.jsonl:1: no text", hint=advice)
    assert caught.value.hint == "mend the data"
    with pytest.raises(ConfigError, match=r"^--column names 'txt'"), told_by_options({"columns": "--column"}):
        raise ConfigError("data.columns names 'txt', which a text has not")
