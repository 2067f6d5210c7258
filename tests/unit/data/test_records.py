"""Files of every format of labelled texts, pairs and anchors become records of one shape, and errors say what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.records import FORMATS, SHAPES, WRITERS, Record, detect_format, dropped_records, read_records
from trainwright.data.sources import list_shards


def read(path: Path | str, shape: str, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(SourceSpec(str(path)), shape, **options)]


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_format_has_a_shape_and_what_is_written_can_be_read() -> None:
    assert set(FORMATS) == set(SHAPES) == set(WRITERS)
    for shape, writers in WRITERS.items():
        assert set(writers) - {"parallel"} <= set(FORMATS[shape])


# ---- labelled


def test_named_columns_in_any_container(tmp_path: Path) -> None:
    wanted = [{"text": "好书", "label": "pos"}, {"text": "dull, flat", "label": "neg"}]
    rows = [{"sentence": one["text"], "Sentiment": one["label"]} for one in wanted]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*rows).encode()))
    assert read(tmp_path / "a.jsonl.gz", "labelled") == wanted
    assert read(file(tmp_path, "a.json", json.dumps(rows)), "labelled") == wanted
    assert read(file(tmp_path, "a.csv", 'Sentence,Sentiment\n好书,pos\n"dull, flat",neg\n'), "labelled") == wanted
    assert read(file(tmp_path, "a.tsv", "sentence\tSentiment\n好书\tpos\ndull, flat\tneg\n"), "labelled") == wanted
    assert read(file(tmp_path, "a.data", lines(*rows)), "labelled") == wanted  # an ending that says nothing
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "labelled") == wanted


def test_records_say_where_they_came_from(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "text\tlabel\nx\t1\n\ny\t0\n")
    found = list(read_records(SourceSpec(str(path)), "labelled"))
    assert found[1] == Record({"text": "y", "label": "0"}, f"{path}:4", "a.tsv:4")


def test_columns_may_be_renamed_and_reach_into_objects(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"body": {"zh": "好"}, "label": "no", "stars": 5, "id": 7}))
    columns = {"text": "body.zh", "label": "stars"}
    assert read(path, "labelled", columns=columns) == [{"text": "好", "label": "5", "id": "7"}]


@pytest.mark.parametrize(
    ("rows", "labels", "options"),
    [
        ([3, 1], ["3", "1"], {}),
        ([1, 0], ["good", "bad"], {"names": ("bad", "good")}),
        (["1", "0"], ["good", "bad"], {"names": ("bad", "good")}),
        ([2.5, 4], [2.5, 4.0], {}),
        (["2.5", "4"], [2.5, 4.0], {}),
        (["10", "4"], ["10", "4"], {}),
        ([["a", "b"], []], [["a", "b"], []], {}),
        (["a;b", "b"], [["a", "b"], ["b"]], {"separator": ";"}),
        (["['a', 'b']", '["b"]'], [["a", "b"], ["b"]], {}),
        ([True, False], ["true", "false"], {}),
    ],
)
def test_labels_are_names_numbers_or_lists(
    tmp_path: Path, rows: list[Any], labels: list[Any], options: dict[str, Any]
) -> None:
    path = file(tmp_path, "a.jsonl", lines(*({"text": "x", "label": label} for label in rows)))
    assert [record["label"] for record in read(path, "labelled", **options)] == labels


def test_a_second_text_and_labels_that_are_hidden(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "a.jsonl",
        lines({"premise": "a", "hypothesis": "b", "label": -1, "idx": 3}, {"premise": "a", "hypothesis": "c"}),
    )
    assert read(path, "labelled") == [{"text": "a", "text2": "b", "id": "3"}, {"text": "a", "text2": "c"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "a fine film\t1\nso dull\t0\nfine\t1\nbad\t0\n"),
        ("a.tsv", "1\ta fine film\n0\tso dull\n1\tfine\n0\tbad\n"),
        ("a.csv", "a fine film,1\nso dull,0\nfine,1\nbad,0\n"),
        ("a.txt", "a fine film\t1\nso dull\t0\nfine\t1\nbad\t0\n"),
        ("a.all", "1 a fine film\n0 so dull \n1 fine\n0 bad\n"),
        ("a.txt", "__label__1 a fine film\n__label__0 so dull\n__label__1 fine\n__label__0 bad\n"),
    ],
)
def test_tables_without_a_header_and_lines_with_the_label_first(tmp_path: Path, name: str, text: str) -> None:
    found = read(file(tmp_path, name, text), "labelled")
    assert found[:2] == [{"text": "a fine film", "label": "1"}, {"text": "so dull", "label": "0"}]
    assert len(found) == 4


def test_several_fasttext_labels_and_the_two_classes_of_trec(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", "__label__a __label__b one\n__label__a two\n")
    assert read(path, "labelled") == [{"text": "one", "label": ["a", "b"]}, {"text": "two", "label": "a"}]
    path = file(tmp_path, "b.label", "DESC:manner How did it ?\nENTY:cremat What film ?\n")
    assert read(path, "labelled")[0] == {"text": "How did it ?", "label": "DESC"}
    assert read(path, "labelled", format="trec_fine")[1] == {"text": "What film ?", "label": "ENTY:cremat"}


def test_numbered_columns(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "17\tu\tv\tyes\n18\tw\tx\tno\n")
    columns = {"text": 1, "text2": "2", "label": 3}
    assert read(path, "labelled", columns=columns)[0] == {"text": "u", "text2": "v", "label": "yes"}
    with pytest.raises(DataError, match=r"a.tsv:1: a table of 4 columns without a header.*\n.*data.columns"):
        read(path, "labelled")
    with pytest.raises(DataError, match=r"a.tsv:1: 4 columns; expected at least 10, since text is column 9"):
        read(path, "labelled", columns={"text": 9})


def test_a_header_of_unknown_names_is_not_taken_for_a_record(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "Bemerkung\tUrteil\n" + "gut gemacht\t1\nschlecht\t0\n" * 3)
    with pytest.raises(DataError, match=r"looks like a header.*\n.*\{text: Bemerkung, label: Urteil\}"):
        read(path, "labelled")
    assert len(read(path, "labelled", columns={"text": "Bemerkung", "label": "Urteil"})) == 6


def test_the_container_can_be_named(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", "text,label\nx,1\n")
    assert read(path, "labelled", format="csv") == [{"text": "x", "label": "1"}]


# ---- encodings


def test_another_encoding_is_named_and_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a.all"
    path.write_bytes("1 a café\x85\n0 plain\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.all:1: invalid UTF-8 .* looks like cp1252\n.*data.encoding: cp1252"):
        read(path, "labelled")
    assert read(path, "labelled", encoding="latin-1")[0]["text"] == "a café\x85"  # no line end, whatever Python thinks
    problems = Problems()
    assert len(read(path, "labelled", on_error="skip", problems=problems)) == 1
    assert problems.counts == {"invalid-utf8": 1}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("这家酒店很好，服务也不错。", "gb18030"),
        ("這間酒店環境和服務態度亦算不錯", "big5"),
        ("Das Hôtel wäre schön gewesen", "latin-1"),
    ],
)
def test_the_encoding_is_guessed_by_what_it_would_say(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(f"text\tlabel\n{text}\t1\n".encode(encoding))
    with pytest.raises(DataError, match=f"looks like {encoding}"):
        read(path, "labelled")
    assert read(path, "labelled", encoding=encoding) == [{"text": text, "label": "1"}]


def test_encodings_that_cannot_be_read(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "text\tlabel\n")
    with pytest.raises(ConfigError, match="Did you mean 'latin-1'"):
        read(path, "labelled", encoding="latin1x")
    with pytest.raises(ConfigError, match="iconv -f utf-16"):
        read(path, "labelled", encoding="utf-16")


# ---- errors


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"instruction": "Add", "output": "2"}))
    with pytest.raises(DataError) as caught:
        read(path, "qa")
    assert str(caught.value).startswith(f"{path}:1: it has instruction, output; expected a question")
    assert "these columns are alpaca" in caught.value.message
    assert "(messages)" in (caught.value.hint or "")


def test_a_label_of_a_text_is_not_taken_for_parts_of_it(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "a fine film", "label": "good"}))
    with pytest.raises(DataError, match=r"a.jsonl:1: it has text, label; expected .*these columns are labelled"):
        read(path, "tagged")


def test_a_misnamed_column_is_found(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"txet": "x", "label": 1}))
    with pytest.raises(DataError, match=r"a.jsonl:1: it has txet, label; expected.*\n.*data.columns: \{text: txet\}"):
        read(path, "labelled")
    with pytest.raises(DataError, match=r"a.jsonl:1: no column 'text'.*did you mean 'txet'"):
        read(path, "labelled", columns={"text": "text"})


def test_a_misspelt_label_is_not_taken_for_no_label(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "x", "lable": 1}))
    with pytest.raises(DataError, match=r"a.jsonl:1: no column for 'label'.*'lable'; did you mean 'label'"):
        read(path, "labelled")
    assert read(path, "labelled", columns={"label": "lable"}) == [{"text": "x", "label": "1"}]
    assert read(file(tmp_path, "b.jsonl", lines({"text": "x", "url": 1})), "labelled") == [{"text": "x"}]


def test_arguments_are_checked_with_what_was_meant(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "x", "label": 1}))
    with pytest.raises(ConfigError, match=r"'txt'.*Did you mean 'text'"):
        read(path, "labelled", columns={"txt": "x"})
    with pytest.raises(ConfigError, match=r"data.format is 'trek'.*Did you mean 'trec'"):
        read(path, "labelled", format="trek")
    with pytest.raises(ConfigError, match=r"'squad' \(squad is a format of qa\)"):
        read(path, "labelled", format="squad")
    with pytest.raises(ConfigError, match=r"shape 'labeled'.*Did you mean 'labelled'"):
        read(path, "labeled")
    with pytest.raises(ConfigError, match="on_error"):
        read(path, "labelled", on_error="ignore")


def test_bad_rows_stop_with_their_place_or_are_counted(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "a.jsonl",
        lines({"text": "x", "label": "a"}, {"text": 3, "label": "a"}, {"label": "a"}, {"text": "y", "label": {}})
        + "nonsense\n"
        + '{"text": "\\ud800", "label": "a"}\n',
    )
    with pytest.raises(DataError, match=r"a.jsonl:2: column 'text' is a number \(3\); expected text"):
        read(path, "labelled")
    problems = Problems()
    assert read(path, "labelled", on_error="skip", problems=problems) == [{"text": "x", "label": "a"}]
    assert problems.counts == {
        "not-a-string": 1,
        "missing-field": 1,
        "bad-label": 1,
        "not-json": 1,
        "invalid-unicode": 1,
    }
    assert dropped_records(problems) == 5
    assert f"{path}:3: no column for 'text'; it has label; expected one of text, sentence" in problems.examples[1]


@pytest.mark.parametrize("written", ["NaN", "1e999", "-Infinity", "9" * 400])
def test_labels_that_are_quantities_are_finite(tmp_path: Path, written: str) -> None:
    path = file(tmp_path, "a.jsonl", f'{{"text": "x", "label": 1.5}}\n{{"text": "y", "label": {written}}}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: column 'label' is .*; expected a finite number"):
        read(path, "labelled")
    problems = Problems()
    assert read(path, "labelled", on_error="skip", problems=problems) == [{"text": "x", "label": 1.5}]
    assert problems.counts == {"bad-label": 1}


def test_an_empty_file_is_counted(tmp_path: Path) -> None:
    file(tmp_path, "a.jsonl", "\n")
    file(tmp_path, "b.jsonl", lines({"text": "x", "label": 1}))
    problems = Problems()
    assert len(read(tmp_path, "labelled", problems=problems)) == 1
    assert problems.counts == {"empty": 1}


def test_the_format_of_a_file_can_be_asked_for(tmp_path: Path) -> None:
    (shard,) = list_shards(SourceSpec(str(file(tmp_path, "a.all", "1 fine\n0 bad\n"))))
    assert detect_format(shard, "labelled") == "label_text"
    (shard,) = list_shards(SourceSpec(str(file(tmp_path, "b.jsonl", lines({"conversations": []})))))
    assert detect_format(shard, "messages") == "sharegpt"


# ---- text


def test_running_text_of_columns_and_files(tmp_path: Path) -> None:
    assert read(file(tmp_path, "a.txt", "one\ntwo\n"), "text") == [{"text": "one\ntwo\n"}]
    path = file(tmp_path, "a.jsonl", lines({"body": "x"}, {"body": ""}))
    problems = Problems()
    assert read(path, "text", columns={"text": "body"}, on_error="skip", problems=problems) == [{"text": "x"}]
    assert problems.counts == {"empty": 1}


# ---- pairs


@pytest.mark.parametrize(
    "keys", [("src", "tgt"), ("document", "summary"), ("dialogue", "summary"), ("abstract", "title")]
)
def test_pairs_by_their_usual_names(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = file(tmp_path, "a.jsonl", lines(dict(zip(keys, ("long", "short"), strict=True))))
    assert read(path, "pair") == [{"source": "long", "target": "short"}]


def test_several_references_and_nested_languages(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"fname": "t", "dialogue": "d", "summary1": "s", "summary2": "u"}))
    assert read(path, "pair") == [{"source": "d", "target": "s", "references": ["s", "u"], "id": "t"}]
    path = file(tmp_path, "b.jsonl", lines({"translation": {"de": "ja", "en": "yes"}}))
    columns = {"source": "translation.de", "target": "translation.en"}
    assert read(path, "pair", columns=columns) == [{"source": "ja", "target": "yes"}]


def test_tables_of_pairs_without_a_header(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "to title\tlong\tshort\nto title\tlonger\tless\n")
    assert read(path, "pair")[1] == {"source": "longer", "target": "less"}
    path = file(tmp_path, "b.tsv", "x\ty\nu\tv\n")
    assert read(path, "pair", columns={"source": 1, "target": 0})[0] == {"source": "y", "target": "x"}


def test_parallel_files(tmp_path: Path) -> None:
    file(tmp_path, "t.de", "eins\nzwei\n\nvier\n")
    file(tmp_path, "t.en", "one\r\ntwo\r\nthree\r\nfour\r\n")
    problems = Problems()
    source = str(tmp_path / "t.{de,en}")
    with pytest.raises(DataError, match=r"t.de:3: an empty line"):
        read(source, "pair")
    found = list(read_records(SourceSpec(source), "pair", on_error="skip", problems=problems))
    assert [record.fields["target"] for record in found] == ["one", "two", "four"]
    assert (Path(found[2].where).name, found[2].key) == ("t.de:4", "t.de:4")
    assert problems.counts == {"empty-side": 1}
    whole = f"{{{tmp_path / 't.de'},{tmp_path / 't.en'}}}"
    assert len(read(whole, "pair", on_error="skip")) == 3


@pytest.mark.parametrize(("source", "target"), [("a\nb\nc\n", "x\ny\n"), ("a\n", "x\ny\nz\n")])
def test_parallel_files_of_unequal_length_are_refused(tmp_path: Path, source: str, target: str) -> None:
    file(tmp_path, "t.de", source)
    file(tmp_path, "t.en", target)
    counts = {"t.de": source.count("\n"), "t.en": target.count("\n")}
    with pytest.raises(DataError) as caught:
        read(tmp_path / "t.{de,en}", "pair", on_error="skip")
    for name, count in counts.items():
        assert f"{name} has {count} lines" in caught.value.message or f"{name} {count};" in caught.value.message


def test_lines_that_cannot_be_read_keep_their_place_in_parallel_files(tmp_path: Path) -> None:
    (tmp_path / "t.de").write_bytes(b"eins\nzw\xffei\ndrei\n")
    file(tmp_path, "t.en", "one\ntwo\nthree\n")
    problems = Problems()
    found = read(tmp_path / "t.{de,en}", "pair", on_error="skip", problems=problems)
    assert found == [{"source": "eins", "target": "one"}, {"source": "drei", "target": "three"}]


# ---- anchors


def test_texts_alone_are_anchors_to_predict_on(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "猫", "id": 3}, {"text": "dog"}))
    assert read(path, "anchors") == [{"anchor": "猫", "id": "3"}, {"anchor": "dog"}]
    assert read(file(tmp_path, "b.jsonl", lines({"query": "a"})), "anchors") == [{"anchor": "a"}]
    path = file(tmp_path, "c.jsonl", lines({"body": "a"}))
    assert read(path, "anchors", columns={"anchor": "body"}) == [{"anchor": "a"}]
    path = file(tmp_path, "d.jsonl", lines({"anchor": "a", "postive": "b"}))
    with pytest.raises(DataError, match=r"it has anchor, postive; expected .*\n.*positive: postive"):
        read(path, "anchors")


def test_anchors_with_negatives_of_every_style(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "a.jsonl",
        lines(
            {"query": "q", "pos": ["p", "r"], "neg": ["n"]},
            {"query": "q", "pos": "p", "negative_1": "m", "negative_2": "n"},
        ),
    )
    assert read(path, "anchors") == [
        {"anchor": "q", "positive": "p", "negatives": ["n"]},
        {"anchor": "q", "positive": "r", "negatives": ["n"]},
        {"anchor": "q", "positive": "p", "negatives": ["m", "n"]},
    ]
    assert len({record.key for record in read_records(SourceSpec(str(path)), "anchors")}) == 3


def test_pairs_with_a_label_keep_those_that_belong_together(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "sentence1,sentence2,label\na,b,1\nc,d,0\ne,f,entailment\n")
    problems = Problems()
    assert [one["anchor"] for one in read(path, "anchors", problems=problems)] == ["a", "e"]
    assert (problems.counts, dropped_records(problems)) == ({"pair-apart": 1}, 0)
    path = file(tmp_path, "b.csv", "sentence1,sentence2,label\na,b,3.5\n")
    with pytest.raises(DataError, match=r"b.csv:2: column 'label'.*expected 1 where"):
        read(path, "anchors")
    path = file(tmp_path, "d.jsonl", lines({"anchor": "a", "positive": []}))
    with pytest.raises(DataError, match=r"d.jsonl:1: column 'positive' is an empty list"):
        read(path, "anchors")
    path = file(tmp_path, "c.tsv", "a\tb\nc\td\n")
    assert read(path, "anchors") == [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d"}]
