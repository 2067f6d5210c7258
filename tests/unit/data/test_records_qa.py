"""Questions of SQuAD, CMRC and flat rows; answers stand where the text has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import DataError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.records import dropped_records, read_records
from trainwright.data.records.qa import locate

CONTEXT = "Normandy is a region in France, and France is a country."


def read(folder: Path, value: Any, **options: Any) -> list[dict[str, Any]]:
    path = folder / "a.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return [dict(record.fields) for record in read_records(SourceSpec(str(path)), "qa", **options)]


def squad(*questions: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"version": "v2.0", "data": [{"title": "N", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def test_squad_1_and_2(tmp_path: Path) -> None:
    answers = [{"text": "France", "answer_start": 24}, {"text": "in France", "answer_start": 21}]
    found = read(
        tmp_path,
        squad(
            {"id": "1", "question": "Where?", "answers": answers},
            {"id": "2", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": answers},
            {"id": "3", "question": "Where?", "answers": answers[:1], "is_impossible": False},
            {"id": "4", "question": "When?", "answers": []},
        ),
    )
    known = {"context": CONTEXT, "title": "N"}
    both = {"text": ["France", "in France"], "answer_start": [24, 21]}
    one = {"text": ["France"], "answer_start": [24]}
    none: dict[str, list[Any]] = {"text": [], "answer_start": []}
    assert found == [
        {"id": "1", "question": "Where?", **known, "answers": both},
        {"id": "2", "question": "Who?", **known, "answers": none, "is_impossible": True},
        {"id": "3", "question": "Where?", **known, "answers": one, "is_impossible": False},
        {"id": "4", "question": "When?", **known},
    ]


def test_places_of_nested_questions(tmp_path: Path) -> None:
    read(tmp_path, squad({"id": "1", "question": "a", "answers": []}, {"id": "2", "question": "b", "answers": []}))
    found = list(read_records(SourceSpec(str(tmp_path / "a.json")), "qa"))
    assert [record.key for record in found] == ["a.json:1/1/1", "a.json:1/1/2"]
    assert found[1].where.endswith("a.json item 1, paragraph 1, question 2")


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["France"], "answer_start": [24]},
        [{"text": "France", "answer_start": 24}],
        {"text": "France", "answer_start": 24},
        ["France"],
        "France",
    ],
)
def test_flat_rows(tmp_path: Path, answers: Any) -> None:
    row = {"context": CONTEXT, "question": "Where?", "answers": answers, "id": 5}
    wanted = {"text": ["France"], "answer_start": [24]}
    assert read(tmp_path, [row]) == [{"id": "5", "context": CONTEXT, "question": "Where?", "answers": wanted}]


def test_flat_rows_without_answers(tmp_path: Path) -> None:
    row = {"context": CONTEXT, "question": "Where?"}
    (hidden, empty) = read(tmp_path, [row, {**row, "answers": {"text": [], "answer_start": []}}])
    assert "answers" not in hidden
    assert "item 1" in hidden["id"]
    assert empty["is_impossible"] is True  # as data sets of SQuAD 2 write it on the hub


def test_cmrc_files_without_places(tmp_path: Path) -> None:
    context = "生命数耗完即算为踢爆。收费4.9元。"
    asked = [
        {"query_id": "Q0", "query_text": "算为什么？", "answers": ["踢爆"]},
        {"query_id": "Q1", "query_text": "收费多少？", "answers": ["4.9元", 4.9, 39764.0]},
    ]
    problems = Problems()
    first, second = read(
        tmp_path, [{"context_id": "D", "context_text": context, "title": "T", "qas": asked}], problems=problems
    )
    assert first == {
        "id": "Q0",
        "context": context,
        "question": "算为什么？",
        "title": "T",
        "answers": {"text": ["踢爆"], "answer_start": [8]},
    }
    assert second["answers"] == {"text": ["4.9元", "4.9"], "answer_start": [13, 13]}
    assert problems.counts == {"answer-dropped": 1}


def test_wrong_places_are_mended_and_counted(tmp_path: Path) -> None:
    def asked(text: str, start: int) -> dict[str, Any]:
        return {"id": f"{text}{start}", "question": "?", "answers": [{"text": text, "answer_start": start}]}

    problems = Problems()
    found = read(
        tmp_path,
        squad(asked("France", 24), asked("France", 26), asked("France", 40), asked("Normandy 。", -1)),
        problems=problems,
    )
    assert [one["answers"]["answer_start"][0] for one in found] == [24, 24, 36, 0]
    assert found[3]["answers"]["text"] == ["Normandy"]
    assert problems.counts == {"offset-repaired": 3}
    assert dropped_records(problems) == 0
    assert "item 1, paragraph 1, question 2: answer 'France' is not at character 26" in problems.examples[0]


def test_a_question_none_of_whose_answers_is_in_the_text(tmp_path: Path) -> None:
    lost = {"id": "1", "question": "?", "answers": [{"text": "Paris", "answer_start": 3}]}
    with pytest.raises(DataError, match=r"question 1: no answer stands in the text \('Paris' should be at 3\)"):
        read(tmp_path, squad(lost))
    problems = Problems()
    kept = {"id": "2", "question": "?", "answers": [{"text": "France", "answer_start": 24}]}
    assert len(read(tmp_path, squad(lost, kept), on_error="skip", problems=problems)) == 1
    assert dropped_records(problems) == 1


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"id": "1", "answers": []}, "no column for 'question'; it has id, answers"),
        ({"question": "?", "answers": 7.5, "id": "1"}, "no answer stands in the text"),
        ({"question": "?", "answers": [{"text": "France"}, {"text": "x", "answer_start": "a"}]}, "start is text"),
        ({"question": "?", "id": "1", "answers": {"text": None, "answer_start": None}}, "as many texts as starts"),
        (
            {"question": "?", "id": "1", "answers": [{"text": "", "answer_start": 3}]},
            "answer is empty.*\n.*is_impossible",
        ),
        ({"question": "?", "id": "1", "answers": [], "is_impossible": "maybe"}, "expected true or false"),
        ({"question": "?", "answers": {"text": ["a", "b"], "answer_start": [1]}}, "as many texts as starts"),
    ],
)
def test_bad_questions_are_told(tmp_path: Path, question: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a.json item 1, paragraph 1, question 1: .*{message}"):
        read(tmp_path, squad(question))


def test_tables_say_places_and_truths_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = ["context,question,answer,answer_start,is_impossible", f'"{CONTEXT}",?,France,36,False']
    path.write_text("\n".join([*rows, f'"{CONTEXT}",?,,,True', f'"{CONTEXT}",?,France,,0']), encoding="utf-8")
    found = [dict(record.fields) for record in read_records(SourceSpec(str(path)), "qa")]
    assert [one["answers"]["answer_start"] for one in found] == [[36], [], [24]]
    assert [one["is_impossible"] for one in found] == [False, True, False]


def test_where_an_answer_stands() -> None:
    assert locate("abcabc", "abc", 3) == (3, "abc")
    assert locate("abcabc", "abc", 2) == (3, "abc")
    assert locate("abcabc", "abc", 1) == (0, "abc")
    assert locate("abcabc", "abc", -1) == (0, "abc")
    assert locate("他在北京，工作", "“北京。”", 2) == (2, "北京")
    assert locate("abc", "xyz", 0) is None
    assert locate("abc", "", 0) is None
    assert locate("abc", "。", 0) is None
