"""Records of every shape in the formats they are read from: as rows, as lines, or as one document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.records.chat_writers import as_alpaca, as_messages, as_prompt_completion, as_sharegpt
from trainwright.data.records.record import Unusable
from trainwright.data.records.tags import convert_tags
from trainwright.data.records.words import join_words, parts_of_tags

__all__ = ["WRITERS", "Writer", "flat_row"]


@dataclass(frozen=True)
class Writer:
    """How a format is written; one of the three is given.

    Attributes:
        row: a record as a row, for jsonl, json, csv and tsv.
        lines: record, its number from 1, and the scheme of tags, as lines with their ends.
        document: all records as one JSON value.
        cells: rows are written without a header, their values in this order.
        sides: two files, in braces: the lines of each are joined by a tab here and parted when written.
    """

    row: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    lines: Callable[[Mapping[str, Any], int, str], str] | None = None
    document: Callable[[Iterable[Mapping[str, Any]]], Any] | None = None
    cells: tuple[str, ...] = ()
    sides: bool = False


def _need(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(key)
    if value is None:
        raise Unusable("not-written", f"the record has no {key!r}")
    return value


def _one_line(text: str, *, what: str = "a text", tabs: bool = False) -> str:
    """Text that may stand on a line of its own."""
    found = "a line break" if "\n" in text or "\r" in text else "a tab" if tabs and "\t" in text else None
    if found:
        raise Unusable("not-written", f"{what} has {found} ({text!r:.60}), which this format cannot hold")
    return text


def _keys(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Rows of these keys; the first must be there."""

    def row(fields: Mapping[str, Any]) -> dict[str, Any]:
        _need(fields, names[0])
        return {key: fields[key] for key in ("id", *names) if fields.get(key) is not None}

    return row


def flat_row(row: Mapping[str, Any]) -> dict[str, str | int | float]:
    """A row whose values fit in the cells of a table, in a form that is read back. Raises Unusable."""
    flat: dict[str, str | int | float] = {}
    for key, value in row.items():
        if key == "negatives":
            flat.update({f"negative_{number}": text for number, text in enumerate(value, start=1)})
        elif key in ("tokens", "tags") and all(isinstance(word, str) and not set(word) & set(" \t") for word in value):
            flat[key] = " ".join(value)
        elif key == "label" and isinstance(value, list):
            flat[key] = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, (str, int, float)):
            flat[key] = value
        else:
            raise Unusable("not-written", f"{key!r} is a list or an object, which a table cannot hold")
    return flat


# ---- labels


def _label_first(prefix: str, *, several: bool) -> Callable[[Mapping[str, Any], int, str], str]:
    def lines(fields: Mapping[str, Any], number: int, scheme: str) -> str:
        label = _need(fields, "label")
        if isinstance(label, list) and not several:
            raise Unusable("not-written", "several labels, which this format cannot hold")
        names = [str(name) for name in (label if isinstance(label, list) else [label])]
        if not names or any(not name or any(c.isspace() for c in name) for name in names):
            raise Unusable(
                "not-written", f"the label {label!r:.40} is empty or has a space, which this format cannot hold"
            )
        if fields.get("text2") is not None:
            raise Unusable("not-written", "a second text, which this format cannot hold")
        text = _one_line(fields["text"])
        return f"{' '.join(prefix + name for name in names)} {text}\n"

    return lines


# ---- tags


def _conll(fields: Mapping[str, Any], number: int, scheme: str) -> str:
    tags = _in_scheme(fields, scheme)
    for word in fields["tokens"]:
        _one_line(word, what="a word", tabs=True)
        if not word:
            raise Unusable("not-written", "an empty word, which this format cannot hold")
    return "".join(f"{word}\t{tag}\n" for word, tag in zip(fields["tokens"], tags, strict=True)) + "\n"


def _in_scheme(fields: Mapping[str, Any], scheme: str) -> list[str]:
    tags = _need(fields, "tags")
    if len(tags) != len(fields["tokens"]):
        raise Unusable("not-written", f"{len(fields['tokens'])} words and {len(tags)} tags")
    try:
        return convert_tags(tags, "iob2", scheme)
    except DataError as error:
        raise Unusable("not-written", error.message) from error


def _parts(fields: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]], list[tuple[int, int, str]]]:
    """Text, places of the words, and marked parts."""
    if isinstance(fields.get("text"), str) and isinstance(fields.get("offsets"), list):
        text, offsets = fields["text"], [(start, end) for start, end in fields["offsets"]]
    else:
        text, offsets = join_words(fields["tokens"])
    _in_scheme(fields, "iob2")
    return text, offsets, parts_of_tags(offsets, fields["tags"])


def _spans(fields: Mapping[str, Any]) -> dict[str, Any]:
    text, offsets, parts = _parts(fields)
    entities = [{"start": start, "end": end, "label": kind, "text": text[start:end]} for start, end, kind in parts]
    words = [{"start": start, "end": end} for start, end in offsets]
    return {**_keys("tokens")({**fields, "tokens": words}), "text": text, "entities": entities}


def _cluener(fields: Mapping[str, Any]) -> dict[str, Any]:
    text, _, parts = _parts(fields)
    label: dict[str, dict[str, list[list[int]]]] = {}
    for start, end, kind in parts:
        label.setdefault(kind, {}).setdefault(text[start:end], []).append([start, end - 1])
    return {**({"id": fields["id"]} if "id" in fields else {}), "text": text, "label": label}


# ---- relations


def _semeval(fields: Mapping[str, Any], number: int, scheme: str) -> str:
    (start, end), (tail_start, tail_end) = fields["head"], fields["tail"]
    if start < tail_end and tail_start < end:
        raise Unusable("not-written", "the two entities overlap, which this format cannot hold")
    text, offsets = join_words(fields["tokens"])
    marks = {
        offsets[start][0]: "<e1>",
        offsets[tail_start][0]: "<e2>",
    }
    ends = {offsets[end - 1][1]: "</e1>", offsets[tail_end - 1][1]: "</e2>"}
    marked = "".join(
        ends.get(place, "") + marks.get(place, "") + text[place : place + 1] for place in range(len(text) + 1)
    )
    name = str(fields.get("id", number))
    relation = f"{fields['relation']}\nComment:\n" if fields.get("relation") is not None else ""
    return f'{name if name.isdigit() else number}\t"{_one_line(marked)}"\n{relation}\n'


def _tacred(fields: Mapping[str, Any]) -> dict[str, Any]:
    (start, end), (tail_start, tail_end) = fields["head"], fields["tail"]
    row = {"token": fields["tokens"], "subj_start": start, "subj_end": end - 1}
    row |= {"obj_start": tail_start, "obj_end": tail_end - 1}
    return {**_keys("token", *row, "relation")({**fields, **row})}


# ---- questions


def _squad(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Questions of one title, and of one context, that follow each other are put together."""
    articles: list[dict[str, Any]] = []
    version = "1.1"
    for fields in records:
        title, context = fields.get("title", ""), fields["context"]
        if not articles or articles[-1]["title"] != title:
            articles.append({"title": title, "paragraphs": []})
        paragraphs = articles[-1]["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != context:
            paragraphs.append({"context": context, "qas": []})
        answers = fields.get("answers", {"text": [], "answer_start": []})
        listed = zip(answers["text"], answers["answer_start"], strict=True)
        question: dict[str, Any] = {"id": fields["id"], "question": fields["question"]}
        question["answers"] = [{"text": text, "answer_start": start} for text, start in listed]
        if "is_impossible" in fields:
            question["is_impossible"] = fields["is_impossible"]
            version = "v2.0"
        paragraphs[-1]["qas"].append(question)
    return {"version": version, "data": articles}


# ---- pairs


def _sides(fields: Mapping[str, Any], number: int, scheme: str) -> str:
    if "references" in fields:
        raise Unusable("not-written", "several targets, which this format cannot hold")
    source = _one_line(fields["source"], what="the source", tabs=True)
    return f"{source}\t{_one_line(_need(fields, 'target'), what='the target', tabs=True)}\n"


WRITERS: dict[str, dict[str, Writer]] = {
    "text": {"text": Writer(row=_keys("text"))},
    "messages": {
        "messages": Writer(row=as_messages),
        "sharegpt": Writer(row=as_sharegpt),
        "alpaca": Writer(row=as_alpaca),
        "prompt_completion": Writer(row=as_prompt_completion),
        "text": Writer(row=_keys("text")),
    },
    "labelled": {
        "labelled": Writer(row=_keys("text", "text2", "label")),
        "labelled_table": Writer(row=_keys("text", "label"), cells=("text", "label")),
        "fasttext": Writer(lines=_label_first("__label__", several=True)),
        "label_text": Writer(lines=_label_first("", several=False)),
    },
    "tagged": {
        "tokens": Writer(row=_keys("tokens", "tags")),
        "conll": Writer(lines=_conll),
        "spans": Writer(row=_spans),
        "cluener": Writer(row=_cluener),
    },
    "relation": {
        "relation": Writer(row=_keys("tokens", "head", "tail", "relation")),
        "semeval": Writer(lines=_semeval),
        "tacred": Writer(row=_tacred),
    },
    "qa": {
        "qa": Writer(row=_keys("context", "question", "title", "answers", "is_impossible")),
        "squad": Writer(document=_squad),
    },
    "pair": {
        "pair": Writer(row=_keys("source", "target", "references")),
        "pair_table": Writer(row=_keys("source", "target"), cells=("source", "target")),
        "parallel": Writer(lines=_sides, sides=True),
    },
    "anchors": {
        "anchors": Writer(row=_keys("anchor", "positive", "negatives")),
        "anchors_table": Writer(row=_keys("anchor", "positive"), cells=("anchor", "positive")),
    },
}
"""Shape, then name, as in `FORMATS`; the first of a shape holds all that its records hold."""
