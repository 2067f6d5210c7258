"""Standard input as records of a task, and the lines of records that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.base.errors import DataError
from trainwright.data.examples.encoding import Refusal
from trainwright.data.records.record import TASK_SHAPES
from trainwright.trainer import predicting


def seen(monkeypatch: pytest.MonkeyPatch, task: str, text: str, **options: Any) -> tuple[list[Any], Any]:
    """The records that arrive where predictions are made, and what `predict_file` gives."""
    arrived: list[Any] = []

    def predict(trained: Any, source: str, **_: Any) -> Any:
        for number, line in enumerate(Path(source).read_text(encoding="utf-8").split("\n")[:-1]):
            arrived.append(json.loads(line))
            yield {"where": f"in:{number + 1}"}, Refusal("it is odd", None) if number % 2 else {"label": line[:1]}

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(section=SimpleNamespace(name=task), records_shape=lambda: TASK_SHAPES[task])
    given = {"out": None, "to": None, "rows": 4, "stdin": io.StringIO(text), **options}
    return arrived, predicting.predict_file(trained, "-", **given)


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
    assert arrived == [record]


@pytest.mark.parametrize("task", ["qa", "relation"])
def test_a_line_of_text_that_is_no_record_says_what_is(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    with pytest.raises(DataError, match=f"the task {task} reads") as caught:
        seen(monkeypatch, task, "Who ?\n")
    assert "one JSON object a line" in str(caught.value.hint)


def test_json_stays_as_it_is_whatever_its_texts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": "a\u2028b"}, {"text": "c\u0085d"}]  # line ends to Unicode, not to JSON lines
    arrived, _ = seen(monkeypatch, "ner", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    assert arrived == records


def test_what_cannot_be_used_has_a_line_and_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, (lines, refused) = seen(monkeypatch, "ner", "a\nb\n")
    assert [json.loads(line) for line in lines] == [{"label": "{"}, {"error": "it is odd"}]
    assert refused == ["in:2: it is odd"]
    _, (lines, refused) = seen(monkeypatch, "ner", "a\nb\n", out=tmp_path / "答案.jsonl")
    assert (lines, len(refused)) == ([], 1)
    assert len((tmp_path / "答案.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_nothing_on_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="standard input is empty"):
        seen(monkeypatch, "ner", "\n")


def test_a_file_of_lines_is_read_as_texts_and_a_txt_file_is_told_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "新.txt"
    path.write_text("\ufeff你好\n\nHello\n", encoding="utf-8")
    arrived: list[Any] = []

    def predict(trained: Any, source: str, **_: Any) -> Any:
        if source.endswith(".txt"):
            raise DataError("no known format")
        arrived.extend(map(json.loads, Path(source).read_text(encoding="utf-8").split("\n")[:-1]))
        yield from ({"label": "x"} for _ in ())

    monkeypatch.setattr(predicting, "predict", predict)
    trained: Any = SimpleNamespace(section=SimpleNamespace(name="classification"), records_shape=lambda: "labelled")
    given: dict[str, Any] = {"out": None, "to": None, "rows": 4, "stdin": io.StringIO()}
    predicting.predict_file(trained, str(path), format=predicting.LINES, **given)
    assert arrived == [{"text": "你好"}, {"text": "Hello"}]
    with pytest.raises(DataError) as caught:
        predicting.predict_file(trained, str(path), **given)
    assert "--format lines" in str(caught.value.hint)
