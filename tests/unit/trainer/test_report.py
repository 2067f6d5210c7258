"""Reports: tables straight in any script, files that programs read, a picture that shows every count."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from trainwright.base.text import display_width
from trainwright.tasks.task import Report, Table
from trainwright.trainer.report import confusion_svg, describe_report, write_report

REPORT = Report(
    metrics={"accuracy": 0.75, "f1_macro": np.float64(0.5)},
    tables=(Table("by class", ("class", "f1", "count"), (("好评", 0.5, 12000), ("bad", 1.0, 3)), ("note",)),),
    labels=("好评", "<bad>"),
    confusion=[[3, 1], [0, 4]],
    errors=({"text": "不错", "expected": "好评", "predicted": "bad", "probability": np.float32(0.5)},),
)


def test_columns_are_straight_in_chinese() -> None:
    title, head, chinese, english, note = describe_report(REPORT)
    assert (title, note) == ("by class", "note")
    assert display_width(chinese) == display_width(english) == display_width(head)
    assert chinese.endswith("12,000")


def test_files_hold_what_the_report_says(tmp_path: Path) -> None:
    numbers = write_report(tmp_path, "test", REPORT, loss=1.25)
    assert numbers == {"loss": 1.25, "accuracy": 0.75, "f1_macro": 0.5}
    stored = json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))
    assert stored["metrics"] == numbers
    assert stored["confusion"] == [[3, 1], [0, 4]]
    (error,) = (tmp_path / "test-errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(error) == {"text": "不错", "expected": "好评", "predicted": "bad", "probability": 0.5}
    assert "好评" in (tmp_path / "test.txt").read_text(encoding="utf-8")


def test_the_picture_is_xml_with_every_label_and_count() -> None:
    tree = ElementTree.fromstring(confusion_svg(REPORT.labels, [[3, 1], [0, 4]]))
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("好评") == texts.count("<bad>") == 2
    assert {"3", "1", "4"} <= set(texts)
    assert "0" not in texts
