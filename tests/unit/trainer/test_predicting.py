"""Standard input as records of a task, and the lines of records that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.examples.encoding import Refusal
from trainwright.data.records.record import TASK_SHAPES
from trainwright.trainer import predicting
from trainwright.trainer.trained import Reading

TRAINED = Reading("labelled", {"text": "内容"}, {"encoding": "gb18030", "names": ["a"], "scheme": "iob1"})


def seen(monkeypatch: pytest.MonkeyPatch, task: str, text: str, **options: Any) -> tuple[list[Any], Any]:
    """How the records are read where predictions are made and these records, and what `predict_file` gives."""
    arrived: list[Any] = []

    def predict(trained: Any, source: str, reading: Reading, **_: Any) -> Any:
        arrived.append(reading)
        for number, line in enumerate(Path(source).read_text(encoding="utf-8").split("\n")[:-1]):
            arrived.append(json.loads(line))
            yield {"where": f"in:{number + 1}"}, Refusal("it is odd", None) if number % 2 else {"label": line[:1]}

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(
        section=SimpleNamespace(name=task), records_shape=lambda: TASK_SHAPES[task], reading=TRAINED
    )
    given = {"out": None, "to": None, "rows": 4, "stdin": io.StringIO(text), **options}
    result = predicting.predict_file(trained, "-", **given)
    return arrived, result


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("classification", {"text": "哪年 ?"}),
        ("ner", {"text": "哪年 ?"}),
        ("translation", {"source": "哪年 ?"}),
        ("embedding", {"anchor": "哪年 ?"}),
        ("sft", {"messages": [{"role": "user", "content": "哪年 ?"}]}),
    ],
)
def test_a_line_of_text_is_what_the_task_reads(monkeypatch: pytest.MonkeyPatch, task: str, record: Any) -> None:
    arrived, _ = seen(monkeypatch, task, " 哪年 ?\r\n\n")
    assert arrived == [Reading(), record], "its column is not that of the training data"


@pytest.mark.parametrize("task", ["qa", "relation"])
def test_a_line_of_text_that_is_no_record_says_what_is(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    with pytest.raises(DataError, match=f"the task {task} reads") as caught:
        seen(monkeypatch, task, "Who ?\n")
    assert "one JSON object a line" in str(caught.value.hint)


def test_json_stays_as_it_is_whatever_its_texts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": "a\u2028b"}, {"text": "c\u0085d"}]  # line ends to Unicode, not to JSON lines
    arrived, _ = seen(monkeypatch, "ner", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    of_training = Reading("auto", {"text": "内容"}, {"names": ["a"], "optional": ["text"]})
    assert arrived == [of_training, *records], "columns as in training, where they are there; encoding of its own"


def test_columns_are_named_for_records_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, _ = seen(monkeypatch, "ner", '{"a": "x"}\n', columns={"text": "a"})
    assert (arrived[0].columns, arrived[0].more["optional"]) == ({"text": "a"}, [])
    with pytest.raises(ConfigError, match="standard input holds texts, which have no columns"):
        seen(monkeypatch, "ner", "x\n", columns={"text": "a"})


def test_standard_input_may_be_of_any_format(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[Any] = []

    def predict(trained: Any, source: str, reading: Reading, **_: Any) -> Any:
        arrived.extend((reading.format, Path(source).read_text(encoding="utf-8")))
        yield from ()

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(records_shape=lambda: "tagged", reading=TRAINED)
    given: dict[str, Any] = {"out": None, "to": None, "rows": 4, "stdin": io.StringIO("你\n好\n\n")}
    predicting.predict_file(trained, "-", format="conll", **given)
    assert arrived == ["conll", "你\n好\n\n\n"]


def test_what_cannot_be_used_has_a_line_and_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, (lines, refused) = seen(monkeypatch, "ner", "a\nb\n")
    assert [json.loads(line) for line in lines] == [{"label": "{"}, {"error": "it is odd"}]
    assert refused == ["in:2: it is odd"]
    _, (lines, refused) = seen(monkeypatch, "ner", "a\nb\n", out=tmp_path / "答案.jsonl")
    assert (lines, len(refused)) == ([], 1)
    assert len((tmp_path / "答案.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_places_are_those_of_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(trained: Any, source: str, *_: Any, **__: Any) -> Any:
        yield {"where": f"{source}:1", "id": f"{source}:1"}, {"id": f"{source}:1", "label": "x"}
        yield {"where": f"{source}:3"}, Refusal("it is odd", None)
        if fails:
            raise DataError(f"{source}:4: no column", hint="name it")

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(records_shape=lambda: "qa", reading=TRAINED)
    given: dict[str, Any] = {"out": None, "to": None, "rows": 4}
    fails = False
    lines, refused = predicting.predict_file(trained, "-", stdin=io.StringIO("{}\n"), **given)
    assert json.loads(lines[0])["id"] == "standard input:1"
    assert refused == ["standard input:3: it is odd"]
    fails = True
    with pytest.raises(DataError, match=r"^standard input:4: no column"):
        predicting.predict_file(trained, "-", stdin=io.StringIO("{}\n"), **given)


def test_nothing_on_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="standard input is empty"):
        seen(monkeypatch, "ner", "\n")


def test_a_file_of_lines_is_read_as_texts_and_a_txt_file_is_told_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "新.txt"
    path.write_text("\ufeff你好\n\nHello\n", encoding="utf-8")
    arrived: list[Any] = []

    def predict(trained: Any, source: str, reading: Reading, **_: Any) -> Any:
        if source.endswith(".txt"):
            raise DataError("no known format")
        written = Path(source).read_text(encoding="utf-8").split("\n")[:-1]
        arrived.extend(json.loads(line) if line else None for line in written)
        yield from ({"label": "x"} for _ in ())

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(
        section=SimpleNamespace(name="classification"), records_shape=lambda: "labelled", reading=TRAINED
    )
    given: dict[str, Any] = {"out": None, "to": None, "rows": 4, "stdin": io.StringIO()}
    predicting.predict_file(trained, str(path), format=predicting.LINES, **given)
    assert arrived == [{"text": "你好"}, None, {"text": "Hello"}], "lines keep their numbers"
    with pytest.raises(DataError) as caught:
        predicting.predict_file(trained, str(path), **given)
    assert "--format lines" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("task", "to", "record", "expected"),
    [
        (
            "translation",
            "pair",
            {"source": "猫", "target": "old", "references": ["old", "older"]},
            {"source": "猫", "target": "cat"},
        ),
        (
            "sft",
            "messages",
            {"messages": [{"role": "user", "content": "猫?"}, {"role": "assistant", "content": "old"}]},
            {"messages": [{"role": "user", "content": "猫?"}, {"role": "assistant", "content": "cat"}]},
        ),
        (
            "dialogue",
            "prompt_completion",
            {"messages": [{"role": "user", "content": "猫?"}]},
            {"prompt": "猫?", "completion": "cat"},
        ),
    ],
)
def test_what_was_written_stands_in_the_place_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str, to: str, record: Any, expected: Any
) -> None:
    def predict(*_: Any, **__: Any) -> Any:
        yield {**record, "where": "in:1"}, {"text": "cat", "ended": True, "tokens": 1}

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(records_shape=lambda: TASK_SHAPES[task], reading=TRAINED)
    out = tmp_path / "答.jsonl"
    predicting.predict_file(trained, "in", out=out, to=to, rows=4, stdin=io.StringIO())
    assert json.loads(out.read_text(encoding="utf-8")) == expected
