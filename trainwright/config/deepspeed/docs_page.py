"""Writes the tables of docs/deepspeed.md: `python -m trainwright.config.deepspeed.docs_page docs/deepspeed.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainwright.config.deepspeed.language import DEEPSPEED
from trainwright.config.deepspeed.tables import Block, Entry, Leaf, Maps, NoEffect, Variants
from trainwright.config.problems import show

__all__ = ["key_tables", "update_page"]

MARKER = "tables in code. -->\n"


def update_page(text: str) -> str:
    """docs/deepspeed.md with its tables made anew: everything behind the marker comment is replaced."""
    head, found, _ = text.partition(MARKER)
    if not found:
        raise ValueError(f"the page has no line that ends in {MARKER!r}")
    return head + MARKER + "\n" + key_tables()


def key_tables() -> str:
    """Every key of DeepSpeed's with its default and its fate: single keys first, then a table for each section."""
    single = {key: entry for key, entry in DEEPSPEED.items() if not isinstance(entry, (Block, Variants))}
    parts = [_table("Single keys", _rows(single, ""))]
    for key, entry in DEEPSPEED.items():
        if isinstance(entry, Block):
            parts.append(_table(f"`{key}`", _block_rows(entry, key)))
        elif isinstance(entry, Variants):
            parts.append(_table(f"`{key}`", [*_type_rows(entry, key), *_rows(entry.keys, f"{key}.")]))
            parts += [
                _table(f"`{key}.params` of {name}", _rows(choice.keys, ""))
                for name, choice in entry.choices.items()
                if not choice.feature
            ]
    return "\n".join(parts)


Row = tuple[str, str, str]


def _table(title: str, rows: list[Row]) -> str:
    lines = [f"### {title}", "", "| key | DeepSpeed's default | what becomes of it |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _rows(keys: Mapping[str, Entry], path: str) -> list[Row]:
    return list(_each_row(keys, path))


def _each_row(keys: Mapping[str, Entry], path: str) -> Iterator[Row]:
    for key, entry in keys.items():
        here = f"{path}{key}"
        if isinstance(entry, Block):
            yield from _block_rows(entry, here)
        elif isinstance(entry, Variants):
            yield from _type_rows(entry, here)
        else:
            yield f"`{here}`", _default(entry), _fate(entry)


def _block_rows(block: Block, path: str) -> list[Row]:
    """The rows of a section; one that is refused as a whole names its keys in one row."""
    if block.named:
        return _rows(block.keys, f"{path}.<name>.")
    if not block.feature:
        return _rows(block.keys, f"{path}.")
    instead = f" {block.instead}" if block.instead else ""
    if block.switch:
        fate = f"false: no effect. true: refused, {block.feature} is not built yet.{instead}"
        switch = block.keys[block.switch]
        assert isinstance(switch, NoEffect)
        rows = [(f"`{path}.{block.switch}`", _default(switch), fate)]
    else:
        rows = [(f"`{path}`", "`null`", f"refused: {block.feature} is not built yet.{instead}")]
    inside = [name for name in _names(block) if name != block.switch]
    if inside:
        above = f"{path}.{block.switch}" if block.switch else path
        rows.append((", ".join(f"`{path}.{name}`" for name in inside), "", f"as `{above}`"))
    return rows


def _names(block: Block) -> Iterator[str]:
    for key, entry in block.keys.items():
        if isinstance(entry, Block):
            between = f"{key}.<name>." if entry.named else f"{key}."
            yield from (f"{between}{name}" for name in _names(entry))
        else:
            yield key


def _type_rows(entry: Variants, path: str) -> list[Row]:
    built = [name for name, choice in entry.choices.items() if not choice.feature]
    refused = [f"{name} ({choice.feature})" for name, choice in entry.choices.items() if choice.feature]
    fate = f"`{entry.to}`; built: {', '.join(built)}; refused, not built yet: {', '.join(refused)}"
    return [(f"`{path}.type`", "`null`", fate)]


def _default(entry: Leaf) -> str:
    value: Any = entry.default
    shown = f"{value:g}" if isinstance(value, float) else show(value)
    return f"`{shown}`"


def _fate(entry: Leaf) -> str:
    if isinstance(entry, Maps):
        return f"`{entry.to}`" + (f" ({entry.about})" if entry.about else "")
    if isinstance(entry, NoEffect):
        return f"no effect: {entry.reason}"
    off = " or ".join(dict.fromkeys(show(value) for value in entry.off))
    instead = f" {entry.instead}" if entry.instead else ""
    return f"{off}: no effect. Else refused: {entry.feature} is not built yet.{instead}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
