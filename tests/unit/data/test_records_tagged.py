"""Words with tags from CoNLL columns, rows of tokens and marked texts; relations of marked entities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import DataError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.records import dropped_records, read_records

WANTED = {"tokens": ["EU", "rejects", "German", "call"], "tags": ["B-ORG", "O", "B-MISC", "O"]}


def read(path: Path, shape: str = "tagged", **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(SourceSpec(str(path)), shape, **options)]


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        "EU NNP I-NP I-ORG\nrejects VBZ I-VP O\nGerman JJ I-NP I-MISC\ncall NN I-NP O\n\nBonn NNP I-NP I-LOC\n",
        "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\nGerman JJ I-NP I-MISC\ncall NN I-NP O\n\n\n"
        "-DOCSTART- -X- O O\n\nBonn NNP I-NP I-LOC\n\n",
        "EU\tB-ORG\r\nrejects\tO\r\nGerman\tB-MISC\r\ncall\tO\r\n\r\nBonn\tB-LOC\r\n",
        "EU S-ORG\nrejects O\nGerman S-MISC\ncall O\n \t\nBonn S-LOC",
        "# id 1\nEU _ _ B-ORG\nrejects _ _ O\nGerman _ _ B-MISC\ncall _ _ O\n\n# id 2 domain=train\nBonn _ _ B-LOC\n",
        "# text = EU ...\n1\tEU\tB-ORG\n2\trejects\tO\n3\tGerman\tB-MISC\n4\tcall\tO\n\n1\tBonn\tB-LOC\n",
    ],
    ids=["iob1", "docstart", "tabs-crlf", "bioes-spaces", "comments", "numbered"],
)
@pytest.mark.parametrize("name", ["a.conll", "a.txt", "a.tsv", "eng.train"])
def test_conll_columns(tmp_path: Path, text: str, name: str) -> None:
    columns = {"tokens": 1} if text.startswith("# text") else {}
    found = read(file(tmp_path, name, text), columns=columns)
    assert found == [WANTED, {"tokens": ["Bonn"], "tags": ["B-LOC"]}]


def test_a_column_of_tags_can_be_chosen(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "EU NNP B-NP B-ORG\ncall NN I-NP O\n\n")
    assert read(path, columns={"tags": "2"}) == [{"tokens": ["EU", "call"], "tags": ["B-NP", "I-NP"]}]
    assert read(path, columns={"tags": 1}) == [{"tokens": ["EU", "call"], "tags": ["NNP", "NN"]}]  # classes of words
    with pytest.raises(DataError, match=r"'tags' is 'ner'; the columns of a CoNLL file have no names"):
        read(path, columns={"tags": "ner"})
    with pytest.raises(DataError, match=r"a.conll:1: 4 columns"):
        read(path, columns={"tags": 7})


def test_words_that_are_spaces_or_marks(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "北 B-LOC\n京 I-LOC\n\u3000 O\n# O\n\xa0 O\n\n  O\n#1 B-X\n")
    assert [one["tokens"] for one in read(path)] == [["北", "京", "\u3000", "#", "\xa0"], [" ", "#1"]]


def test_a_mark_of_numbers_may_be_the_first_word(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "# O\n1 O\nEU B-ORG\n")
    assert [one["tokens"] for one in read(path)] == [["#", "1", "EU"]]
    path = file(tmp_path, "b.conll", "# id 1\nEU B-ORG\n1 O\n")
    assert [one["tokens"] for one in read(path)] == [["EU", "1"]]


def test_a_word_without_a_tag_is_named(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "a\tB-X\nb\tI-X\n\nc\tO\nd\t\n")
    with pytest.raises(DataError, match=r"a.conll:4: word 2 has no tag"):
        read(path)
    problems = Problems()
    assert len(read(path, on_error="skip", problems=problems)) == 1
    assert problems.counts == {"bad-tags": 1}


def test_a_line_of_another_width_is_named_and_its_sentence_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "a O\nb O\n\nc O\nd\ne O\n\nf O\n")
    with pytest.raises(DataError, match=r"a.conll:5: 1 columns \('d'\); expected 2, as in the lines before"):
        read(path, format="conll")
    problems = Problems()
    found = read(path, on_error="skip", problems=problems, format="conll")
    assert [one["tokens"] for one in found] == [["a", "b"], ["f"]]
    assert problems.counts == {"wrong-field-count": 1}


def test_forbidden_sequences_are_refused_or_mended_and_counted(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "a B-X\nb I-X\n\nc O\nd I-X\n\ne B-X\nf B-X\n")
    with pytest.raises(
        DataError,
        match=r"a.conll:4: tag 'I-X' of word 2 may not stand there in iob2 \(... O I-X, the end\)\n.*conlleval",
    ):
        read(path)
    problems = Problems()
    found = read(path, on_error="skip", problems=problems)
    assert found[1]["tags"] == ["O", "B-X"]
    assert problems.counts == {"tags-repaired": 1}
    assert dropped_records(problems) == 0
    assert read(path, scheme="iob1")[1]["tags"] == ["O", "B-X"]  # IOB1 allows it
    bad = file(tmp_path, "b.conll", "a B-X\nb Q-X\nc B-X\n")
    with pytest.raises(DataError, match=r"b.conll:1: column 'tags': tag 'Q-X' of word 2"):
        read(bad)


def test_rows_of_tokens_and_tags(tmp_path: Path) -> None:
    names = ("O", "B-ORG", "I-ORG", "B-MISC")
    rows = {"id": "0", "tokens": WANTED["tokens"], "ner_tags": [1, 0, 3, 0]}
    path = file(tmp_path, "a.jsonl", lines(rows))
    assert read(path, names=names) == [{**WANTED, "id": "0"}]
    with pytest.raises(DataError, match=r"a.jsonl:1: .*the number 1.*0 names of tags\n.*data.names"):
        read(path)
    path = file(tmp_path, "b.jsonl", lines({"words": WANTED["tokens"], "tags": ["S-ORG", "O", "S-MISC", "O"]}))
    assert read(path) == [WANTED]
    path = file(tmp_path, "c.csv", "tokens,tags\nEU rejects German call,B-ORG O B-MISC O\n")
    assert read(path) == [WANTED]
    path = file(tmp_path, "d.jsonl", lines({"tokens": ["a", "b"], "tags": ["O"]}))
    with pytest.raises(DataError, match="2 words in 'tokens' and 1 tags"):
        read(path)
    path = file(tmp_path, "e.jsonl", lines({"tokens": ["a", "b"]}))
    assert read(path) == [{"tokens": ["a", "b"]}]


def test_spans_in_the_style_of_cluener(tmp_path: Path) -> None:
    text = "浙商银行叶老桂博士"
    row = {"text": text, "label": {"name": {"叶老桂": [[4, 6]]}, "company": {"浙商银行": [[0, 3]]}}}
    (found,) = read(file(tmp_path, "a.jsonl", lines(row)))
    assert found["tokens"] == list(text)
    assert found["tags"][:4] == ["B-company", "I-company", "I-company", "I-company"]
    assert found["tags"][4:] == ["B-name", "I-name", "I-name", "O", "O"]
    assert [text[start:end] for start, end in found["offsets"]] == found["tokens"]
    # the original file is called .json and holds a line for each object
    assert read(file(tmp_path, "b.json", lines(row, row))) == [found, found]
    wrong = {"text": text, "label": {"name": {"叶老桂": [[4, 7]]}}}
    with pytest.raises(DataError, match=r"c.jsonl:1: entity 'name' from 4 to 8 is '叶老桂博' in the text"):
        read(file(tmp_path, "c.jsonl", lines(wrong)))


@pytest.mark.parametrize(
    "entities",
    [
        [{"start": 0, "end": 3, "label": "PER"}, {"start": 13, "end": 17, "label": "LOC"}],
        [{"start_offset": 0, "end_offset": 3, "type": "PER"}, {"start_offset": 13, "end_offset": 17, "type": "LOC"}],
        [[0, 3, "PER"], [13, 17, "LOC"]],
    ],
)
@pytest.mark.parametrize("key", ["entities", "spans", "label", "labels"])
def test_spans_of_annotation_tools(tmp_path: Path, entities: list[Any], key: str) -> None:
    row = {"text": "Ann lives in Bonn.", key: entities}
    (found,) = read(file(tmp_path, "a.jsonl", lines(row)))
    assert found["tokens"] == ["Ann", "lives", "in", "Bonn", "."]
    assert found["tags"] == ["B-PER", "O", "O", "B-LOC", "O"]


def test_words_of_the_file_itself_are_kept(tmp_path: Path) -> None:
    words = [{"text": "New-York", "start": 0, "end": 8}, {"text": "!", "start": 8, "end": 9}]
    row = {"text": "New-York!", "tokens": words, "spans": [{"start": 0, "end": 8, "label": "LOC"}]}
    (found,) = read(file(tmp_path, "a.jsonl", lines(row)))
    assert (found["tokens"], found["tags"]) == (["New-York", "!"], ["B-LOC", "O"])


def test_what_flat_tags_cannot_hold_is_counted(tmp_path: Path) -> None:
    row = {"text": "DotAImba here", "entities": [[0, 4, "G"], [0, 13, "L"], [9, 11, "P"]]}
    problems = Problems()
    (found,) = read(file(tmp_path, "a.jsonl", lines(row)), problems=problems)
    assert found["tags"] == ["B-L", "I-L"]
    (found,) = read(file(tmp_path, "b.jsonl", lines({**row, "entities": [[9, 11, "P"]]})), problems=problems)
    assert found["tags"] == ["O", "B-P"]
    assert problems.counts == {"entity-overlapping": 2, "entity-widened": 1}
    assert "a.jsonl:1" in problems.examples[0]
    assert dropped_records(problems) == 0


def test_a_text_to_predict_on_is_split(tmp_path: Path) -> None:
    (found,) = read(file(tmp_path, "a.jsonl", lines({"text": "Ann 来了", "id": 1})))
    assert found == {
        "tokens": ["Ann", "来", "了"],
        "text": "Ann 来了",
        "offsets": [[0, 3], [4, 5], [5, 6]],
        "id": "1",
    }


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([[0, 99, "A"]], "lies outside of the text of 3 characters"),
        ([[2, 1, "A"]], "lies outside"),
        ([{"start": 0, "label": "A"}], "an entity has start, label; expected one of end"),
        ([[0, 1]], r"expected \{start, end, label\}"),
        ([[0, "1", "A"]], "two whole numbers"),
        ([[0, 1, 5]], "an entity's label is a number"),
    ],
)
def test_bad_entities_are_told(tmp_path: Path, entities: list[Any], message: str) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "abc", "entities": entities}))
    with pytest.raises(DataError, match=rf"a.jsonl:1: .*{message}"):
        read(path)


# ---- relations

RELATION = {
    "tokens": ["The", "child", "was", "wrapped", "into", "the", "cradle", "."],
    "head": [1, 2],
    "tail": [6, 7],
    "relation": "Entity-Destination(e1,e2)",
}


def test_semeval_with_and_without_relations(tmp_path: Path) -> None:
    sentence = '"The <e1>child</e1> was wrapped into the <e2>cradle</e2>."'
    text = f"8001\t{sentence}\r\nEntity-Destination(e1,e2)\r\nComment: none.\r\n\r\n8002\t{sentence}\nOther\nComment:\n"
    found = read(file(tmp_path, "a.txt", text), "relation")
    assert found == [{**RELATION, "id": "8001"}, {**RELATION, "relation": "Other", "id": "8002"}]
    found = read(file(tmp_path, "b.txt", f"8001\t{sentence}\n8002\t{sentence}\n"), "relation")
    assert [one["id"] for one in found] == ["8001", "8002"]
    assert all("relation" not in one for one in found)
    broken = file(tmp_path, "c.txt", f'8001\t{sentence}\nOther\n\n8002\t"No <e1>mark</e1> here."\nOther\n')
    with pytest.raises(DataError, match=r"c.txt:4: no <e2> in"):
        read(broken, "relation")
    problems = Problems()
    assert len(read(broken, "relation", on_error="skip", problems=problems)) == 1
    assert problems.counts == {"bad-entity": 1}
    twice = file(tmp_path, "d.txt", '1\t"<e1>a</e1> and <e1>b</e1> of <e2>c</e2>"\nOther\n')
    with pytest.raises(DataError, match=r"d.txt:1: <e1> stands twice"):
        read(twice, "relation")


def test_sentences_with_marks_in_rows(tmp_path: Path) -> None:
    sentence = "The <e1>child</e1> was wrapped into the <e2>cradle</e2>."
    path = file(tmp_path, "a.jsonl", lines({"sentence": sentence, "relation": NAME}, {"text": sentence}))
    assert read(path, "relation") == [RELATION, {key: RELATION[key] for key in ("tokens", "head", "tail")}]
    path = file(tmp_path, "b.jsonl", lines({"sentence": sentence, "relation": 1}))
    assert read(path, "relation", names=("Other", NAME)) == [RELATION]
    with pytest.raises(DataError, match=r"b.jsonl:1: column 'relation' is the number 1, and there are 0 names"):
        read(path, "relation")
    path = file(tmp_path, "c.csv", f'text,label\n"{sentence}",Other\nno marks,Other\n')
    with pytest.raises(DataError, match=r"c.csv:3: no <e1> in 'no marks'"):
        read(path, "relation")
    chinese = file(tmp_path, "d.jsonl", lines({"text": "<e2>北京</e2>是<e1>中国</e1>的首都", "relation": "首都"}))
    (found,) = read(chinese, "relation")
    assert (found["head"], found["tail"]) == ([3, 5], [0, 2])


def test_marks_inside_words_end_them(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", '1\t"<e2>under</e2>ground <e1>steel wire</e1>s"\nOther\n')
    (found,) = read(path, "relation")
    assert found["tokens"] == ["under", "ground", "steel", "wire", "s"]
    assert (found["head"], found["tail"]) == ([2, 4], [0, 1])


NAME = RELATION["relation"]
PLACES = {"subj_start": 1, "subj_end": 1, "obj_start": 6, "obj_end": 6}
TEXT = "The child was wrapped into the cradle."


@pytest.mark.parametrize(
    ("tokens", "entities", "relation"),
    [
        ("tokens", {"head": [1, 2], "tail": [6, 7]}, "relation"),
        ("token", {"h": {"name": "child", "pos": [1, 2]}, "t": {"pos": [6, 7]}}, "label"),
        ("tokens", {"h": ["child", "Q1", [[1]]], "t": ["cradle", "Q2", [[6]]]}, "relation"),
        ("token", PLACES, "relation"),
        ("sentence", {"head": "child", "tail": "cradle", **PLACES}, "relation"),
        ("text", {"head": {"start": 4, "end": 9}, "tail": {"start": 31, "end": 37}}, "relation"),
    ],
    ids=["plain", "opennre", "fewrel", "tacred", "semeval-json", "characters"],
)
def test_relations_of_rows(tmp_path: Path, tokens: str, entities: dict[str, Any], relation: str) -> None:
    row = {tokens: TEXT if tokens == "text" else RELATION["tokens"], **entities, relation: NAME}
    assert read(file(tmp_path, "a.jsonl", lines(row)), "relation") == [RELATION]


def test_entities_outside_of_the_sentence(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({**RELATION, "tail": [6, 9]}))
    with pytest.raises(DataError, match=r"a.jsonl:1: tail is words 6 to 9 of 8"):
        read(path, "relation")
    path = file(tmp_path, "b.jsonl", lines({**RELATION, "head": "child"}))
    with pytest.raises(DataError, match=r"b.jsonl:1: column 'head' is text"):
        read(path, "relation")
