"""A task's report for people and programs: tables as text, numbers as JSON, errors as lines, confusion as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainwright.base.text import align_columns, display_width
from trainwright.tasks.task import Report, Table

__all__ = ["confusion_svg", "describe_report", "describe_table", "write_metrics", "write_report"]

CELL, EDGE, LETTER = 44, 16, 8.2  # of the picture, in pixels: a cell's side, the margin, the width of a terminal cell


def describe_report(report: Report) -> list[str]:
    """Lines for a terminal: every table, or the metrics alone where the task has no table."""
    if not report.tables:
        return align_columns([(name, _cell(value)) for name, value in report.metrics.items()], right=(1,))
    lines: list[str] = []
    for table in report.tables:
        lines += ([""] if lines else []) + describe_table(table)
    return lines


def describe_table(table: Table) -> list[str]:
    """A table with straight columns in any script; numbers stand right."""
    cells = [tuple(_cell(value) for value in row) for row in table.rows]
    numeric = [
        index
        for index in range(len(table.columns))
        if any(not isinstance(row[index], str) for row in table.rows if index < len(row))
    ]
    return [table.title, *align_columns([table.columns, *cells], right=numeric), *table.notes]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_report(folder: Path, split: str, report: Report, *, loss: float) -> dict[str, Any]:
    """Write `SPLIT.json`, `SPLIT.txt`, `SPLIT-errors.jsonl` and, where there are classes, `SPLIT-confusion.svg`.

    Returns: what `SPLIT.json` holds: the metrics, the validation loss among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"loss": loss, **{name: float(value) for name, value in report.metrics.items()}}
    content: dict[str, Any] = {
        "metrics": numbers,
        "tables": [
            {"title": table.title, "columns": list(table.columns), "rows": [list(row) for row in table.rows]}
            for table in report.tables
        ],
    }
    if report.confusion is not None:
        content |= {"labels": list(report.labels), "confusion": [[int(n) for n in row] for row in report.confusion]}
        picture = confusion_svg(report.labels, report.confusion)
        (folder / f"{split}-confusion.svg").write_text(picture, encoding="utf-8")
    _write_json(folder / f"{split}.json", content)
    (folder / f"{split}.txt").write_text("\n".join(describe_report(report)) + "\n", encoding="utf-8")
    errors = "".join(json.dumps(_plain(error), ensure_ascii=False) + "\n" for error in report.errors)
    (folder / f"{split}-errors.jsonl").write_text(errors, encoding="utf-8")
    return numbers


def write_metrics(folder: Path, split: str, metrics: Mapping[str, float]) -> None:
    """Write `SPLIT.json` with the metrics of a task that has no report."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / f"{split}.json", {"metrics": dict(metrics)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON values: numbers of numpy among them become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def confusion_svg(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix as an SVG picture: rows are true labels, columns predicted ones, shade is the share of a row.

    SVG is text: labels in any script are drawn with the fonts of whoever looks at it.
    """
    size = len(labels)
    margin = EDGE + 24 + LETTER * max((display_width(label) for label in labels), default=0)
    side = margin + size * CELL + EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side:.0f}" height="{side:.0f}"'
        f' viewBox="0 0 {side:.0f} {side:.0f}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{margin + size * CELL / 2:.0f}" y="{EDGE}" text-anchor="middle" fill="#555">predicted</text>',
        f'<text transform="translate({EDGE},{margin + size * CELL / 2:.0f}) rotate(-90)" text-anchor="middle"'
        ' fill="#555">true</text>',
    ]
    for index, label in enumerate(labels):
        at = margin + (index + 0.5) * CELL
        name = escape(label)
        parts.append(f'<text x="{margin - 6:.0f}" y="{at + 4:.0f}" text-anchor="end">{name}</text>')
        parts.append(f'<text transform="translate({at + 4:.0f},{margin - 6:.0f}) rotate(-90)">{name}</text>')
    for row, of_row in enumerate(counts):
        total = sum(int(count) for count in of_row)
        for column, count in enumerate(of_row):
            share = int(count) / total if total else 0.0
            x, y = margin + column * CELL, margin + row * CELL
            shade, ink = round(255 - 190 * share), "white" if share > 0.55 else "#222"
            parts.append(
                f'<rect x="{x:.0f}" y="{y:.0f}" width="{CELL}" height="{CELL}" fill="rgb({shade},{shade},255)"'
                ' stroke="#ddd"/>'
            )
            if count:
                parts.append(
                    f'<text x="{x + CELL / 2:.0f}" y="{y + CELL / 2 + 4:.0f}" text-anchor="middle"'
                    f' fill="{ink}">{int(count)}</text>'
                )
    return "\n".join([*parts, "</svg>"]) + "\n"
