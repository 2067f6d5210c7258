"""Records that are only predicted for: read without answers, and with columns that need not be those of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import DataError
from trainwright.data.documents import SourceSpec
from trainwright.data.records import SHAPES, read_records

PLACES = {"id": "7", "context": "猫在睡", "question": "谁?"}
MARKED = "the <e1>cat</e1> sleeps on <e2>mats</e2>"


def asked(path: Path, shape: str, **options: Any) -> list[dict[str, Any]]:
    found = read_records(SourceSpec(str(path)), shape, answers=False, **options)
    return [dict(record.fields) for record in found]


def written(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    text = rows if isinstance(rows[0], str) else [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("shape", "row", "answer"),
    [
        ("labelled", {"text": "好"}, {"label": {"no": "label"}}),
        ("tagged", {"tokens": ["猫", "睡"]}, {"tags": ["I-X"]}),
        ("tagged", {"text": "猫 睡"}, {"label": {"animal": "no places"}}),
        ("tagged", {"text": "猫 睡"}, {"entities": [[0, 99, "animal"]]}),
        ("relation", {"sentence": MARKED}, {"relation": 99}),
        ("qa", PLACES, {"answers": {"text": ["a dog"], "answer_start": [3]}}),
        ("qa", PLACES, {"answers": [], "is_impossible": "perhaps"}),
        ("pair", {"source": "猫"}, {"target": ""}),
        ("anchors", {"anchor": "猫", "positive": "cat"}, {"label": 0}),
        ("messages", {"instruction": "猫?"}, {"output": ["no text"]}),
        ("messages", {"prompt": "猫?"}, {"completion": 5}),
    ],
)
def test_answers_may_be_missing_or_wrong(tmp_path: Path, shape: str, row: dict[str, Any], answer: Any) -> None:
    without, beside = (
        asked(written(tmp_path, name, one), shape) for name, one in (("a.jsonl", row), ("b.jsonl", {**row, **answer}))
    )
    assert without == beside
    assert len(without) == 1
    assert not set(without[0]) & set(SHAPES[shape].answers)


def test_the_column_of_answers_that_training_had_may_be_missing(tmp_path: Path) -> None:
    columns = {"text": "评论", "label": "星"}
    path = written(tmp_path, "a.jsonl", {"评论": "好书"})
    assert asked(path, "labelled", columns=columns) == [{"text": "好书"}]
    with pytest.raises(DataError, match="no column '星'"):
        list(read_records(SourceSpec(str(path)), "labelled", columns=columns))


@pytest.mark.parametrize("shape", ["labelled", "pair"])
def test_a_table_without_a_header_may_hold_texts_alone(tmp_path: Path, shape: str) -> None:
    key = {"labelled": "text", "pair": "source"}[shape]
    path = written(tmp_path, "a.csv", "好书", '"dull, flat"')
    assert asked(path, shape) == [{key: "好书"}, {key: "dull, flat"}]
    answer = {"labelled": "label", "pair": "target"}[shape]
    assert asked(path, shape, columns={key: 0, answer: 1}) == [{key: "好书"}, {key: "dull, flat"}]
    with pytest.raises(DataError):
        list(read_records(SourceSpec(str(path)), shape))


def test_words_alone_are_read_where_the_format_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "猫", "睡", "", "Cats", "")
    assert asked(path, "tagged", format="conll") == [{"tokens": ["猫", "睡"]}, {"tokens": ["Cats"]}]
    tagged = written(tmp_path, "b.txt", "猫 N I-ANIMAL", "睡 V O", "")
    assert asked(tagged, "tagged", columns={"tags": 2}) == [{"tokens": ["猫", "睡"]}]
    with pytest.raises(DataError, match=r"a word in column 0 \(counted from 0\) and its tag in the last one"):
        list(read_records(SourceSpec(str(path)), "tagged", format="conll"))


def test_columns_of_training_are_used_where_the_file_has_them(tmp_path: Path) -> None:
    columns = {"text": "评论", "label": "星"}
    same = written(tmp_path, "a.jsonl", {"text": "a number", "评论": "好书", "星": 5})
    assert asked(same, "labelled", columns=columns, optional=["text", "label"]) == [{"text": "好书"}]
    usual = written(tmp_path, "b.jsonl", {"text": "好书"})
    assert asked(usual, "labelled", columns=columns, optional=["text", "label"]) == [{"text": "好书"}]
    with pytest.raises(DataError, match=r"b.jsonl:1: no column '评论' \(.+ it is 'text'\); it has text"):
        asked(usual, "labelled", columns=columns)
    other = written(tmp_path, "c.jsonl", {"内容": "好书"})
    for optional in ((), ("text", "label")):
        with pytest.raises(DataError, match="内容") as caught:
            asked(other, "labelled", columns=columns, optional=optional)
        assert caught.value.hint == "write data.columns: {text: 内容}"


def test_tables_without_a_header_do_without_the_names_of_training(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "dull, flat\tneg", "好书\tpos", "好\tpos", "坏\tneg")
    found = asked(path, "labelled", columns={"text": "review", "label": "stars"}, optional=["text", "label"])
    assert [one["text"] for one in found] == ["dull, flat", "好书", "好", "坏"]
    with pytest.raises(DataError, match="no column 'review': the file has no header that names it"):
        asked(path, "labelled", columns={"text": "review", "label": "stars"})
