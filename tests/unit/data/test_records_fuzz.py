"""Whatever a file holds, reading it ends in records, counted problems or a DataError: never in another error."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import TrainwrightError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.records import FORMATS, SHAPES, WRITERS, read_records, write_records

LINES = ("a O", "b\tB-X", "", "-DOCSTART- -X- O", "1 text here", "__label__x", "__label__a b", "DESC:x why")
LINES += (
    '8001\t"<e1>a</e1> <e2>b</e2>"',
    "Other",
    "Comment:",
    "{",
    "[",
    '{"text": 1}',
    "\u3000",
    "\t\t",
    "\x85",
    "# id 1",
)
LINES += ('"', "a,b", "x\t1", "中文\t0", "text\tlabel", "<e1>")
KEYS = (
    "role",
    "content",
    "from",
    "value",
    "text",
    "start",
    "end",
    "label",
    "answer_start",
    "pos",
    "qas",
    "context",
    "name",
)


def value(draw: random.Random, depth: int = 0) -> Any:
    simple: list[Any] = [None, True, -1, 0, 3, 2.5, "", "a", "B-X", "中 文", "[1", "\ud800", "{}", '{"name": "f"}', "1"]
    if depth > 2 or draw.random() < 0.5:
        return draw.choice(simple)
    if draw.random() < 0.5:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(KEYS): value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def row(draw: random.Random, shape: str) -> dict[str, Any]:
    names = [name for aliases in SHAPES[shape].columns.values() for name in aliases]
    names += ["paragraphs", "qas", "subj_start", "subj_end", "obj_start", "obj_end", "chosen", "negative_1", "summary1"]
    return {draw.choice(names): value(draw) for _ in range(draw.randint(1, 6))}


def outcome(path: Path, shape: str, **options: Any) -> list[dict[str, Any]] | None:
    try:
        found = [dict(record.fields) for record in read_records(SourceSpec(str(path)), shape, **options)]
    except TrainwrightError:
        return None
    for fields in found:
        assert all(key in fields for key in SHAPES[shape].needs) or fields.keys() & {"text", "anchor"}
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_anything(tmp_path: Path, shape: str) -> None:
    draw = random.Random(shape)
    for number in range(80):
        rows = [row(draw, shape) for _ in range(draw.randint(1, 4))]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        for format in ("auto", *FORMATS[shape]):
            outcome(path, shape, format=format)
            found = outcome(path, shape, format=format, on_error="skip", problems=Problems(), names=("O", "B-X"))
            for target in WRITERS[shape] if found else ():
                name = tmp_path / ("out.{a,b}" if target == "parallel" else "out.csv" if number % 2 else "out.json")
                with contextlib.suppress(TrainwrightError):
                    write_records(found or [], name, target, shape=shape, on_error="skip")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", ["txt", "tsv", "csv"])
def test_lines_of_anything(tmp_path: Path, shape: str, ending: str) -> None:
    draw = random.Random(shape + ending)
    for number in range(40):
        path = tmp_path / f"{number}.{ending}"
        text = "\n".join(draw.choice(LINES) for _ in range(draw.randint(1, 8)))
        path.write_bytes(text.encode("utf-8") if draw.random() < 0.9 else b"\xff" + text.encode("utf-8"))
        for format in ("auto", *FORMATS[shape]):
            outcome(path, shape, format=format)
            outcome(path, shape, format=format, on_error="skip", problems=Problems())
