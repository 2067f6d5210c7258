"""Records go from one format to another and back unchanged, or are counted; files appear whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainwright.base.errors import ConfigError, DataError
from trainwright.cli.convert import convert as command
from trainwright.data.documents import SourceSpec
from trainwright.data.records import TASK_SHAPES, convert, read_records, write_records

TAGS = ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC"]
TAGGED = [
    {"tokens": ["Ann", "-", "Lee", "saw", "北", "京"], "tags": TAGS, "id": "1"},
    {"tokens": ["#1", "New-York", "U.S."], "tags": ["O", "B-LOC", "B-LOC"], "id": "2"},
]
USER, BOT = {"role": "user", "content": 'a\t"b"\n'}, {"role": "assistant", "content": "好的"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "一"}}}
CHATS = [
    {"messages": [{"role": "system", "content": "S"}, USER, BOT, USER, BOT], "id": "1"},
    {"messages": [USER, BOT], "id": "2"},
]
RESULT = {"role": "tool", "content": "2"}
TOOLS = [
    {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, BOT],
        "tools": [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {}}}],
    }
]
LABELLED = [{"text": 'so, "fine"', "label": "pos", "id": "1"}, {"text": '"quoted"', "label": "neg", "id": "2"}]
ONE: dict[str, list[Any]] = {"text": ["b"], "answer_start": [2]}
NONE: dict[str, list[Any]] = {"text": [], "answer_start": []}
QUESTIONS = [
    {"id": "1", "context": "a b", "question": "?", "title": "T", "answers": ONE, "is_impossible": False},
    {"id": "2", "context": "a b", "question": "!", "title": "T", "answers": NONE, "is_impossible": True},
    {"id": "3", "context": "c", "question": "hidden", "title": "T"},
    {"id": "4", "context": "d", "question": "other", "title": "U", "answers": {"text": ["d"], "answer_start": [0]}},
]
RELATIONS = [
    {"tokens": ["steel", "wire", "in", "cars"], "head": [0, 2], "tail": [3, 4], "relation": "R(e1,e2)", "id": "7"}
]
PAIRS = [{"source": "ein Satz", "target": "a sentence"}, {"source": "中文", "target": "Chinese"}]
ANCHORS = [{"anchor": "a", "positive": "b", "negatives": ["c", "d"]}, {"anchor": "e", "positive": "f"}]


def read(path: Path | str, shape: str, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(SourceSpec(str(path)), shape, **options)]


def without(records: Sequence[Mapping[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


@pytest.mark.parametrize(
    ("shape", "records", "format", "name", "lost"),
    [
        ("tagged", TAGGED, "conll", "a.conll", ("id",)),
        ("tagged", TAGGED, "conll", "a.tsv", ("id",)),
        ("tagged", TAGGED, "tokens", "a.jsonl", ()),
        ("tagged", TAGGED, "jsonl", "a.jsonl.gz", ()),
        ("tagged", TAGGED, "tokens", "a.csv", ()),
        ("messages", CHATS, "messages", "a.jsonl", ()),
        ("messages", CHATS, "sharegpt", "a.json", ()),
        ("messages", CHATS, "alpaca", "a.jsonl", ()),
        ("messages", CHATS, "prompt_completion", "a.jsonl", ()),
        ("messages", CHATS[1:], "alpaca", "a.csv", ()),
        ("messages", TOOLS, "messages", "a.jsonl", ()),
        ("messages", TOOLS, "sharegpt", "a.json", ()),
        ("messages", TOOLS, "prompt_completion", "a.json", ()),
        ("labelled", LABELLED, "jsonl", "a.jsonl", ()),
        ("labelled", LABELLED, "csv", "a.csv", ()),
        ("labelled", LABELLED, "tsv", "a.tsv", ()),
        ("labelled", LABELLED, "fasttext", "a.txt", ("id",)),
        ("labelled", LABELLED * 2, "labelled_table", "a.tsv", ("id",)),
        ("labelled", [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": ["a"]}], "csv", "a.csv", ()),
        ("labelled", [{"text": "x", "label": 2.0}, {"text": "y", "label": 0.125}], "tsv", "a.tsv", ()),
        ("labelled", [{"text": "x", "text2": "y", "label": "1"}], "csv", "a.csv", ()),
        ("qa", QUESTIONS, "squad", "a.json", ()),
        ("relation", RELATIONS, "semeval", "a.txt", ()),
        ("relation", RELATIONS, "tacred", "a.json", ()),
        ("relation", RELATIONS, "relation", "a.jsonl", ()),
        ("pair", PAIRS, "pair", "a.csv", ()),
        ("pair", PAIRS, "pair_table", "a.tsv", ()),
        ("pair", PAIRS, "parallel", "a.{de,en}", ()),
        ("anchors", ANCHORS, "anchors", "a.jsonl", ()),
        ("anchors", ANCHORS, "csv", "a.csv", ()),
        ("text", [{"text": "a\nb"}], "text", "a.jsonl", ()),
    ],
)
def test_what_is_written_is_read_back(
    tmp_path: Path, shape: str, records: list[dict[str, Any]], format: str, name: str, lost: tuple[str, ...]
) -> None:
    done = write_records(records, tmp_path / name, format, shape=shape)
    assert (done.records, done.problems.total) == (len(records), 0)
    assert read(tmp_path / name, shape) == without(records, *lost)
    assert {path.name for path in tmp_path.iterdir()} <= {name, "a.de", "a.en"}


@pytest.mark.parametrize("format", ["spans", "cluener"])
def test_marked_texts_hold_the_same_entities(tmp_path: Path, format: str) -> None:
    write_records(TAGGED, tmp_path / "a.jsonl", format)
    found = read(tmp_path / "a.jsonl", "tagged")
    if format == "spans":  # keeps the words as well
        assert without(found, "text", "offsets") == TAGGED
    write_records(found, tmp_path / "b.jsonl", format)
    again = read(tmp_path / "b.jsonl", "tagged")
    assert again == found
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()]
    if format == "cluener":
        assert rows[0]["text"] == "Ann - Lee saw北京"
        assert rows[0]["label"] == {"PER": {"Ann - Lee": [[0, 8]]}, "LOC": {"北京": [[13, 14]]}}


@pytest.mark.parametrize("scheme", ["iob1", "iob2", "bioes", "bmes", "bilou"])
def test_conll_in_every_scheme(tmp_path: Path, scheme: str) -> None:
    records = [*TAGGED, {"tokens": list("abcd"), "tags": ["B-X", "B-X", "I-X", "I-X"]}]
    write_records(records, tmp_path / "a.conll", "conll", scheme=scheme)
    assert read(tmp_path / "a.conll", "tagged", scheme=scheme) == without(records, "id")
    assert read(tmp_path / "a.conll", "tagged") == without(records, "id")


def test_what_a_format_cannot_hold_is_named_or_counted(tmp_path: Path) -> None:
    both = [*CHATS, *TOOLS, {"text": "bare"}]
    with pytest.raises(DataError, match=r"record 3 of .*tools or further fields of messages.*\n.*on_error: skip"):
        write_records(both, tmp_path / "a.jsonl", "alpaca", shape="messages")
    assert list(tmp_path.iterdir()) == []
    done = write_records(both, tmp_path / "a.jsonl", "alpaca", shape="messages", on_error="skip")
    assert (done.records, done.problems.counts) == (2, {"not-written": 2})
    assert read(tmp_path / "a.jsonl", "messages") == CHATS


@pytest.mark.parametrize(
    ("shape", "record", "format", "name", "message"),
    [
        ("labelled", {"text": "a\nb", "label": "x"}, "fasttext", "a.txt", "a line break"),
        ("labelled", {"text": "a", "label": "x y"}, "fasttext", "a.txt", "has a space"),
        ("labelled", {"text": "a", "label": ["x"]}, "label_text", "a.txt", "several labels"),
        ("labelled", {"text": "a"}, "label_text", "a.txt", "no 'label'"),
        ("labelled", {"text": "a\tb", "label": "x"}, "tsv", "a.tsv", "a tab or a line break.*csv or jsonl"),
        ("tagged", {"tokens": ["a"]}, "conll", "a.conll", "no 'tags'"),
        ("tagged", {"tokens": ["a\tb"], "tags": ["O"]}, "conll", "a.conll", "a word has a tab"),
        ("tagged", {"tokens": ["a", "b"], "tags": ["O"]}, "conll", "a.conll", "2 words and 1 tags"),
        ("tagged", {"tokens": ["a b"], "tags": ["O"]}, "csv", "a.csv", "'tokens' is a list"),
        ("pair", {"source": "a", "target": "b", "references": ["b", "c"]}, "parallel", "a.{x,y}", "several targets"),
        ("pair", {"source": "a"}, "parallel", "a.{x,y}", "no 'target'"),
        ("qa", QUESTIONS[0], "csv", "a.csv", "'answers' is a list or an object"),
        ("relation", {**RELATIONS[0], "tail": [1, 3]}, "semeval", "a.txt", "overlap"),
        ("messages", {"messages": [USER]}, "prompt_completion", "a.json", "not the assistant's"),
    ],
)
def test_each_reason(tmp_path: Path, shape: str, record: dict[str, Any], format: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s){message}"):
        write_records([record], tmp_path / name, format, shape=shape)
    assert list(tmp_path.iterdir()) == []


def test_the_shape_is_told_by_the_format_or_the_keys(tmp_path: Path) -> None:
    write_records(QUESTIONS, tmp_path / "a.json", "squad")
    write_records(TAGGED, tmp_path / "b.jsonl", "jsonl")
    write_records(CHATS, tmp_path / "c.jsonl", "jsonl")
    assert read(tmp_path / "a.json", "qa") == QUESTIONS
    assert read(tmp_path / "b.jsonl", "tagged") == TAGGED
    assert read(tmp_path / "c.jsonl", "messages") == CHATS
    with pytest.raises(DataError, match="a record has x; expected the keys of one of"):
        write_records([{"x": 1}], tmp_path / "d.jsonl", "jsonl")


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    def failing() -> Any:
        yield LABELLED[0]
        raise RuntimeError("the reader failed")

    (tmp_path / "a.jsonl").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError):
        write_records(failing(), tmp_path / "a.jsonl", "jsonl")
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(DataError, match=r"a.jsonl: exists already"):
        write_records(LABELLED, tmp_path / "a.jsonl", "jsonl", overwrite=False)
    write_records(LABELLED, tmp_path / "a.jsonl", "jsonl")
    assert read(tmp_path / "a.jsonl", "labelled") == LABELLED
    with pytest.raises(DataError, match="no records to write"):
        write_records([], tmp_path / "b.jsonl", "jsonl")
    with pytest.raises(DataError, match="is a folder"):
        write_records(LABELLED, tmp_path, "jsonl")


def test_compressed_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_records(LABELLED, tmp_path / name, "jsonl")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n") == 2


def test_arguments_are_checked_with_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'conl' cannot be written.*Did you mean 'conll'"):
        write_records(TAGGED, tmp_path / "a.conll", "conl", shape="tagged")
    with pytest.raises(ConfigError, match=r"parallel text is two files\n.*out.\{de,en\}"):
        write_records(PAIRS, tmp_path / "a.txt", "parallel")
    with pytest.raises(ConfigError, match="zst is read, but not written"):
        write_records(PAIRS, tmp_path / "a.jsonl.zst", "jsonl")
    with pytest.raises(ConfigError, match="Did you mean 'ner'"):
        convert("a.conll", tmp_path / "b", to="conll", task="nre")


def test_conversion_reads_writes_and_counts(tmp_path: Path) -> None:
    source = tmp_path / "a.bmes"
    source.write_text("北 B-LOC\n京 E-LOC\n\n人 O\n大 E-ORG\n\nx O\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a.bmes:4: tag 'E-ORG' of word 2 may not stand there in bioes"):
        convert(str(source), tmp_path / "b.jsonl", task="ner", to="tokens")
    assert not (tmp_path / "b.jsonl").exists()
    done = convert(str(source), tmp_path / "b.jsonl", task="ner", to="tokens", on_error="skip")
    assert (done.written, done.read.counts, done.lost.total) == (3, {"tags-repaired": 1}, 0)
    convert(str(tmp_path / "b.jsonl"), tmp_path / "c.conll", task="ner", to="conll", to_scheme="bioes")
    assert (tmp_path / "c.conll").read_text(encoding="utf-8").startswith("北\tB-LOC\n京\tE-LOC\n\n人\tO\n大\tS-ORG\n")
    with pytest.raises(DataError, match="exists already"):
        convert(str(source), tmp_path / "b.jsonl", task="ner", to="tokens", on_error="skip")


def test_a_source_without_records_says_why(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": 1, "label": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no record could be read\n.*column 'text' is a number"):
        convert(str(source), tmp_path / "b.csv", task="classification", to="csv", on_error="skip")


def test_every_task_has_a_shape() -> None:
    from trainwright.config.tasks import TASK_NAMES

    assert set(TASK_SHAPES) == set(TASK_NAMES)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command)
    source = tmp_path / "a.csv"
    source.write_text("review,stars\nso good,1\nbad,0\n,\n", encoding="utf-8")
    options = ["--task", "classification", "--to", "fasttext", "--names", "neg,pos", "--on-error", "skip"]
    result = CliRunner().invoke(app, [str(source), str(tmp_path / "b.txt"), *options, "--column", "label=stars"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "__label__pos so good\n__label__neg bad\n"
    assert "2 records written" in result.output
    assert "not written: 1 not-written" in result.output
    wrong = CliRunner().invoke(app, [str(source), str(tmp_path / "c.txt"), *options, "--column", "stars"])
    assert isinstance(wrong.exception, ConfigError)
