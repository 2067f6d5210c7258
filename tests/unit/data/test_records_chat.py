"""Conversations of every format become messages of one style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import DataError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.records import read_records
from trainwright.data.records.chat import messages_of

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [1, "一"]}}}


def read(folder: Path, *rows: Any, **options: Any) -> list[dict[str, Any]]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [dict(record.fields) for record in read_records(SourceSpec(str(path)), "messages", **options)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [{"role": "human", "content": "1+1?"}, {"role": "model", "content": "2"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
                ANSWER,
            ]
        },
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"instruction": "1+1?", "input": "", "output": "2"},
        {"instruction": "1+1?", "output": "2"},
        {"instruction": "", "input": "1+1?", "output": "2"},
        {"prompt": "1+1?", "completion": "2"},
        {"question": "1+1?", "answer": "2"},
        {"instruction": "1+1?", "response": "2"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": [QUESTION], "completion": ANSWER},
    ],
)
def test_every_format_says_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == [{"messages": [QUESTION, ANSWER]}]
    assert messages_of(row) == [QUESTION, ANSWER]


def test_system_texts_history_and_inputs(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 1", "output": "2", "system": "S", "history": [["hi", "ho"]], "id": "x"}
    wanted = ["S", "hi", "ho", "Add\n1 1", "2"]
    (found,) = read(tmp_path, row)
    assert [message["content"] for message in found["messages"]] == wanted
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert found["id"] == "x"
    (found,) = read(tmp_path, {"conversations": [{"from": "human", "value": "a"}], "system": "S"})
    assert found["messages"][0] == {"role": "system", "content": "S"}
    (found,) = read(tmp_path, {"messages": [{"role": "system", "content": "own"}, QUESTION], "system": "S"})
    assert [message["content"] for message in found["messages"]] == ["own", "1+1?"]


def test_tool_calls_of_both_styles(tmp_path: Path) -> None:
    written = json.dumps(CALL["function"], ensure_ascii=False)
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": written},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([TOOL]),
    }
    openai_call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [1, "一"]}'}}
    openai = {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [openai_call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    tools = [{"type": "function", "function": TOOL}]
    assert read(tmp_path, sharegpt) == [
        {"messages": [QUESTION, calling, {"role": "tool", "content": "2"}, ANSWER], "tools": tools}
    ]
    (found,) = read(tmp_path, openai)
    assert found["messages"][1] == {**calling, "tool_calls": [{"id": "c1", **CALL}]}
    assert found["messages"][2]["tool_call_id"] == "c1"
    assert found["tools"] == tools
    several = {"conversations": [QUESTION, {"from": "function_call", "value": f"[{written}, {written}]"}]}
    (found,) = read(tmp_path, several)
    assert found["messages"][1]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "asistant", "content": "x"}]}, "the role 'asistant'; did you mean 'assistant'"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, r"messages\[1\] has no content"),
        ({"messages": [QUESTION, {"text": "x"}]}, r"messages\[1\] has text; expected role and content"),
        ({"messages": [QUESTION, "x"]}, r"messages\[1\] is text"),
        ({"messages": []}, "column 'messages' has no messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, r"\[0\] is 'add\(1\)', which is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, r"conversations\[0\] calls a number"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, r"conversations\[0\] calls nothing"),
        ({"messages": [QUESTION, {**ANSWER, "weight": "0"}]}, r"messages\[1\].weight is text \('0'\); expected 0"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight is a number"),
        ({"messages": [QUESTION, {**ANSWER, "reasoning_content": 5}]}, r"messages\[1\].reasoning_content' is a number"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 5}]}, r"content' is a number.*\n  -> mend the data"),
        ({"conversations": [QUESTION], "tools": "none"}, "column 'tools' is 'none', which is not JSON"),
        ({"instruction": "x", "output": 2}, "column 'output' is a number"),
        ({"instruction": "x", "output": "2", "history": ["a"]}, "column 'history' holds text"),
        ({"messages": [QUESTION], "chosen": ANSWER, "rejected": ANSWER}, "preference pair.*\n.*completion: chosen"),
    ],
)
def test_bad_conversations_are_told_with_their_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a.jsonl:2: .*{message}"):
        read(tmp_path, good_like(row), row)
    problems = Problems()
    assert len(read(tmp_path, good_like(row), row, on_error="skip", problems=problems)) == 1
    assert problems.total == 1


def good_like(row: dict[str, Any]) -> dict[str, Any]:
    if "instruction" in row:
        return {"instruction": "1+1?", "output": "2"}
    return {"messages" if "messages" in row else "conversations": [QUESTION, ANSWER]}


def test_conversations_that_are_json_in_a_table(tmp_path: Path) -> None:
    chat = json.dumps([QUESTION, ANSWER]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{chat}"\n', encoding="utf-8")
    (found,) = read_records(SourceSpec(str(tmp_path / "a.csv")), "messages")
    assert found.fields == {"messages": [QUESTION, ANSWER]}
    (tmp_path / "b.csv").write_text('instruction,output,history\n3,4,"[[""1"",""2""]]"\n', encoding="utf-8")
    (found,) = read_records(SourceSpec(str(tmp_path / "b.csv")), "messages")
    assert [message["content"] for message in found.fields["messages"]] == ["1", "2", "3", "4"]


def test_the_older_field_of_one_call(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    (found,) = read(tmp_path, {"messages": [QUESTION, called]})
    function = {"name": "add", "arguments": {"a": 1}}
    assert found["messages"][1]["tool_calls"] == [{"type": "function", "function": function}]


def test_unknown_roles_are_left_to_the_template(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"conversations": [{"from": "critic", "value": "no"}]})
    assert found["messages"] == [{"role": "critic", "content": "no"}]


def test_columns_of_rows_and_of_messages_may_have_other_names(tmp_path: Path) -> None:
    row = {"dialog": [{"speaker": "user", "utterance": "1+1?"}, {"speaker": "assistant", "utterance": "2"}]}
    columns = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    assert read(tmp_path, row, columns=columns) == [{"messages": [QUESTION, ANSWER]}]
    row = {"conversations": [{"from": "human", "value": "1+1?"}], "chosen": {"from": "gpt", "value": "2"}}
    columns = {"prompt": "conversations", "completion": "chosen"}
    assert read(tmp_path, row, columns=columns, format="prompt_completion") == [{"messages": [QUESTION, ANSWER]}]


def test_texts_stay_texts(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "Once upon"}) == [{"text": "Once upon"}]
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (found,) = read_records(SourceSpec(str(tmp_path / "a.txt")), "messages")
    assert found.fields == {"text": "one\ntwo"}
