"""Two entities of a sentence and the relation between them: SemEval 2010 task 8, marked sentences, TACRED's keys, and
plain rows."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.tables import looks_like_rows
from trainwright.data.records.words import split_words

__all__ = ["RELATION"]

_SHAPE = SHAPES["relation"]
_SENTENCE = re.compile(r"\s*(\d+)\t\"?(.*?)\"?\s*")
_MARKS = re.compile(r"</?e[12]>")
_ENDS = ("subj_start", "subj_end", "obj_start", "obj_end")


def _record(
    tokens: list[str], head: Sequence[int], tail: Sequence[int], relation: Any, names: Sequence[str] = ()
) -> dict[str, Any]:
    """A record; a relation that is a number is looked up in `names`."""
    for name, (start, end) in (("head", head), ("tail", tail)):
        if not 0 <= start < end <= len(tokens):
            raise Unusable(
                "bad-entity", f"{name} is words {start} to {end} of {len(tokens)}; expected a part of the sentence"
            )
    fields: dict[str, Any] = {"tokens": tokens, "head": list(head), "tail": list(tail)}
    if relation is not ABSENT and relation is not None:
        fields["relation"] = _relation(relation, names)
    return fields


def _relation(value: Any, names: Sequence[str]) -> str:
    if type(value) is not int:
        return as_text(value, "relation")
    if not 0 <= value < len(names):
        raise Unusable(
            "bad-label",
            f"column 'relation' is the number {value}, and there are {len(names)} names of relations",
            "give the names in order: data.names: [Other, ...]",
        )
    return names[value]


def _tokens(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise Unusable("bad-tokens", f"column 'tokens' is {describe(value)}; expected a list of words")
    return [as_text(word, "tokens") for word in value]


def _place(value: Any, column: str) -> tuple[int, int]:
    """[start, end) of words: two numbers, an object with pos or start and end, or FewRel's [name, id, [[...]]]."""
    if isinstance(value, Mapping):
        value = value.get("pos", [value.get("start"), value.get("end")])
    if isinstance(value, list) and len(value) == 3 and isinstance(value[2], list) and value[2]:
        places = value[2][0]
        if isinstance(places, list) and places and all(type(place) is int for place in places):
            return min(places), max(places) + 1
    if isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value):
        return value[0], value[1]
    raise Unusable(
        "bad-entity", f"column {column!r} is {describe(value)}; expected [first word, word behind the last], from 0"
    )


def _from_rows(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        head, tail = (_place(columns.need(row, key), key) for key in ("head", "tail"))
        words = columns.find(row, "tokens")
        if words is ABSENT or isinstance(words, str):
            text = as_text(row.get("text", words), "text")
            offsets = split_words(text)
            tokens = [text[start:end] for start, end in offsets]
            head, tail = (_words_at(place, offsets, key) for place, key in ((head, "head"), (tail, "tail")))
        else:
            tokens = _tokens(words)
        relation = columns.find(row, "relation")
        return [{**_record(tokens, head, tail, relation, opened.options.names), **columns.extras(row)}]

    yield from opened.read_each(convert)


def _words_at(place: tuple[int, int], offsets: Sequence[tuple[int, int]], column: str) -> tuple[int, int]:
    """The words that characters [start, end) of a text belong to."""
    first = bisect.bisect_right([end for _, end in offsets], place[0])
    last = bisect.bisect_left([start for start, _ in offsets], place[1])
    if first >= last:
        raise Unusable("bad-entity", f"column {column!r}: characters {place[0]} to {place[1]} hold no word of the text")
    return first, last


def _from_tacred(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        ends = [row.get(name) for name in _ENDS]
        for name, place in zip(_ENDS, ends, strict=True):
            if type(place) is not int:
                raise Unusable("bad-entity", f"column {name!r} is {describe(place)}; expected the number of a word")
        head_start, head_end, tail_start, tail_end = (int(place or 0) for place in ends)
        tokens = _tokens(columns.need(row, "tokens"))
        relation = columns.find(row, "relation")
        places = (head_start, head_end + 1), (tail_start, tail_end + 1)
        fields = _record(tokens, *places, relation, opened.options.names)
        return [{**fields, **columns.extras(row)}]

    yield from opened.read_each(convert)


def _is_tacred(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    columns = Columns(_SHAPE, options)
    return any(all(name in row for name in _ENDS) and columns.has(row, "tokens") for row in head)


def _from_semeval(opened: Opened) -> Iterator[Record]:
    """`8001<TAB>"... <e1>x</e1> ... <e2>y</e2>"`, the relation on the next line (not in a test file), `Comment:`."""
    waiting: tuple[int, str, str] | None = None
    relation: Any = ABSENT
    for number, line in opened.lines():
        match = _SENTENCE.fullmatch(line)
        if match is None and line.strip() and not line.startswith("Comment"):
            if waiting is None or relation is not ABSENT:
                error = Unusable("bad-line", f"{line!r:.60}; expected a number, a tab and a sentence in quotes")
                opened.report(opened.where(number), error)
            else:
                relation = line.strip()
        if match is not None:
            yield from _finished(waiting, relation, opened)
            waiting, relation = (number, match.group(1), match.group(2)), ABSENT
    yield from _finished(waiting, relation, opened)


def _finished(waiting: tuple[int, str, str] | None, relation: Any, opened: Opened) -> Iterator[Record]:
    if waiting is None:
        return
    number, name, sentence = waiting
    try:
        yield opened.record({**_marked(sentence, relation), "id": name}, number)
    except Unusable as error:
        opened.report(opened.where(number), error)


def _sentence(row: Mapping[str, Any], columns: Columns) -> Any:
    """The text of a row; a list where it has words."""
    words = columns.find(row, "tokens")
    return row.get("text") if words is ABSENT else words


def _from_marked(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        sentence = as_text(_sentence(row, columns), "sentence")
        fields = _marked(sentence, columns.find(row, "relation"), opened.options.names)
        return [{**fields, **columns.extras(row)}]

    yield from opened.read_each(convert)


def _is_marked(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    columns = Columns(_SHAPE, options)
    if any(columns.has(row, "head", "tail") for row in head):
        return False
    found = [_sentence(row, columns) for row in head]
    return any(isinstance(text, str) and {"<e1>", "<e2>"} <= set(_MARKS.findall(text)) for text in found)


def _marked(sentence: str, relation: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Words of a sentence whose entities stand between <e1> </e1> and <e2> </e2>; marks end words."""
    tokens: list[str] = []
    places: dict[str, int] = {}
    at = 0
    for mark in [*_MARKS.finditer(sentence), None]:
        piece = sentence[at : mark.start() if mark else len(sentence)]
        tokens += [piece[start:end] for start, end in split_words(piece)]
        if mark:
            if mark.group() in places:
                raise Unusable("bad-entity", f"{mark.group()} stands twice in {sentence!r:.60}; expected it once")
            places[mark.group()] = len(tokens)
            at = mark.end()
    missing = [mark for mark in ("<e1>", "</e1>", "<e2>", "</e2>") if mark not in places]
    if missing:
        raise Unusable("bad-entity", f"no {missing[0]} in {sentence!r:.60}; expected <e1>..</e1> and <e2>..</e2>")
    return _record(tokens, (places["<e1>"], places["</e1>"]), (places["<e2>"], places["</e2>"]), relation, names)


RELATION: tuple[Format, ...] = (
    Format(
        "semeval",
        "lines",
        'SemEval 2010 task 8: number, tab, "a sentence with <e1>marks</e1>"; the relation on the next line; Comment:',
        (),
        lambda head, _: any(_SENTENCE.fullmatch(line) and "<e1>" in line for line in head[:1]),
        _from_semeval,
    ),
    Format(
        "tacred",
        "rows",
        "token (or sentence, a list), subj_start, subj_end, obj_start, obj_end (the last word itself), relation",
        ("token", *_ENDS, "relation"),
        _is_tacred,
        _from_tacred,
    ),
    Format(
        "marked",
        "rows",
        "sentence (or text) with <e1>marks</e1> and <e2>marks</e2>, relation",
        ("sentence", "relation"),
        _is_marked,
        _from_marked,
    ),
    Format(
        "relation",
        "rows",
        "tokens, head, tail as [first, behind the last], relation; or text with places in characters; h, t with pos",
        ("tokens", "head", "tail", "relation"),
        looks_like_rows(_SHAPE, "head", "tail"),
        _from_rows,
    ),
)
