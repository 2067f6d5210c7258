"""Words with tags: CoNLL columns, rows of tokens and tags, and texts with marked parts (CLUENER, spans, doccano)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.spans import cluener_parts, listed_parts
from trainwright.data.records.tables import looks_like_rows
from trainwright.data.records.tags import convert_tags, detect_scheme, violations
from trainwright.data.records.words import Part, split_words, tags_of_parts

__all__ = ["TAGGED"]

_SHAPE = SHAPES["tagged"]
_TAG = re.compile(r"O|[BIESMLU]([-_].+)?")
_SPACES = re.compile(r"[ \t]+")  # not str.split: it takes the ideographic space, a token of Chinese files, for a gap
_DOCSTART = "-DOCSTART-"

_Sentence = tuple[int, list[str], list[str]]
"""Line of the first word, words, tags."""


def _in_iob2(tags: Sequence[str], scheme: str, opened: Opened, where: str) -> list[str]:
    """Tags in IOB2. Sequences that the scheme forbids are mended and counted, or refused where problems stop."""
    if "" in tags:
        raise Unusable("bad-tags", f"word {tags.index('') + 1} has no tag; expected a tag for every word")
    try:
        wrong = violations(tags, scheme)
        converted = convert_tags(tags, scheme)
    except DataError as error:
        raise Unusable("bad-tags", f"column 'tags': {error.message}", error.hint) from error
    if wrong:
        at = wrong[0]
        more = f", and {len(wrong) - 1} more of the sentence" if len(wrong) > 1 else ""
        around = " ".join(tags[max(0, at - 2) : at + 3]) + (" ..." if at + 3 < len(tags) else ", the end")
        message = f"tag {tags[at]!r} of word {at + 1} may not stand there in {scheme} (... {around}){more}"
        if opened.policy.on_error == "stop":
            raise Unusable(
                "tags-repaired",
                message,
                "mend them, or set data.on_error: skip to read them as conlleval does, counted",
            )
        opened.note("tags-repaired", f"{where}: {message}")
    return converted


def _scheme_of(opened: Opened, sentences: Iterator[Sequence[str]]) -> str:
    return detect_scheme(sentences) if opened.options.scheme == "auto" else opened.options.scheme


def _conll_columns(options: Options) -> tuple[int, int]:
    """Numbers of the columns of words and tags; -1 is the last."""
    places = []
    for key, default in (("tokens", 0), ("tags", -1)):
        given = str(options.columns.get(key, default))
        if not re.fullmatch(r"-?\d+", given):
            if key in options.optional:
                places.append(default)
                continue
            raise DataError(
                f"data.columns says that {key!r} is {given!r}; the columns of a CoNLL file have no names",
                hint=f"count them from 0: data.columns: {{{key}: {max(default, 0)}}}",
            )
        places.append(int(given))
    return places[0], places[1]


def _cells(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else _SPACES.split(line.strip(" \t"))


def _is_comment(cells: Sequence[str], width: int, line: str) -> bool:
    if not line.startswith("#") or "\t" in line:
        return False
    if not width and len(cells) > 1 and _TAG.fullmatch(cells[-1]):
        return False  # the first line of all: the word # and its tag
    return len(cells) != width or "=" in line or cells[1] == "id"


def _sentences(opened: Opened) -> Iterator[_Sentence]:
    """Sentences between blank lines; comments (`# id 1`) and -DOCSTART- lines are left out.

    Where tags are not read, words stand for them, and a line may hold nothing else.
    """
    token_place, tag_place = _conll_columns(opened.options)
    least = 2 if opened.options.answers else 1
    tag_place = tag_place if opened.options.answers else token_place
    width = first = 0
    words: list[str] = []
    tags: list[str] = []
    broken = False
    for number, line in opened.lines():
        bare = line.strip(" \t")
        cells = _cells(line)
        if not bare or cells[0] == _DOCSTART:
            if words and not broken:
                yield first, words, tags
            words, tags, broken = [], [], False
            continue
        if not words and _is_comment(cells, width, line):
            continue
        if len(cells) == 1 and line[:1] == " " and width == 2:
            cells = [" ", cells[0]]  # the word is a space
        width = width or len(cells)
        if len(cells) != width or not -width <= max(tag_place, token_place, key=abs) < width or width < least:
            seen = f"{len(cells)} columns ({line!r:.60}); expected {max(width, least)}, as in the lines before"
            if width < least or len(cells) == width:
                tag = "the last one" if tag_place == -1 else f"column {tag_place}"
                expected = f"a word in column {token_place} (counted from 0)" + (f" and its tag in {tag}" * (least > 1))
                seen = f"{len(cells)} columns ({line!r:.60}); expected {expected}"
            error = Unusable("wrong-field-count", seen, "one word a line, its columns parted by a tab or spaces")
            opened.report(opened.where(number), error)
            broken = True
        first = first if words else number
        words.append(cells[token_place] if not broken else "")
        tags.append(cells[tag_place].strip() if not broken else "O")
    if words and not broken:
        yield first, words, tags


def _from_conll(opened: Opened) -> Iterator[Record]:
    if not opened.options.answers:
        yield from (opened.record({"tokens": words}, line) for line, words, _ in _sentences(opened))
        return
    scheme = _scheme_of(opened, (tags for _, _, tags in _sentences(opened.quietly())))
    for line, words, tags in _sentences(opened):
        where = opened.where(line)
        try:
            yield opened.record({"tokens": words, "tags": _in_iob2(tags, scheme, opened, where)}, line)
        except Unusable as error:
            opened.report(where, error)


def _looks_like_conll(head: Sequence[str], options: Options) -> bool:
    rows = [_cells(line) for line in head if line.strip() and not line.startswith(("#", _DOCSTART))]
    wide = [row for row in rows if len(row) > 1]
    if len(wide) < 0.9 * len(rows) - 1 or not wide:
        return False
    same = len({len(row) for row in rows}) == 1
    tagged = sum(1 for row in wide if _TAG.fullmatch(row[-1])) > 0.6 * len(wide)
    return tagged or (same and "" in head)


def _token_list(value: Any, column: str) -> list[str]:
    if isinstance(value, str) and value:
        return [as_text(word, column) for word in _SPACES.split(value.strip())]
    if not isinstance(value, list) or not value:
        raise Unusable("bad-tokens", f"column {column!r} is {describe(value)}; expected a list of words")
    words = [word.get("text") if isinstance(word, Mapping) else word for word in value]
    return [as_text(word, column) for word in words]


def _tag_names(value: Any, options: Options) -> list[str]:
    """Names of tags; numbers are looked up in the given names."""
    if isinstance(value, str):
        return _SPACES.split(value.strip())
    if not isinstance(value, list):
        raise Unusable("bad-tags", f"column 'tags' is {describe(value)}; expected a list of tags")
    names = []
    for tag in value:
        if isinstance(tag, int) and not isinstance(tag, bool):
            if not 0 <= tag < len(options.names):
                raise Unusable(
                    "bad-tags",
                    f"column 'tags' holds the number {tag}, and there are {len(options.names)} names of tags",
                    "give the names in order: data.names: [O, B-PER, I-PER, ...]",
                )
            names.append(options.names[tag])
        else:
            names.append(as_text(tag, "tags"))
    return names


def _from_tokens(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)

    def all_tags() -> Iterator[Sequence[str]]:
        for row in opened.quietly().rows():
            try:
                found = columns.find(_mapping(row.fields), "tags")
                if found is not ABSENT and found is not None:
                    yield _tag_names(found, opened.options)
            except Unusable:
                continue  # reported by the reading that follows

    scheme = _scheme_of(opened, all_tags())

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        words = _token_list(columns.need(row, "tokens"), "tokens")
        fields: dict[str, Any] = {"tokens": words}
        found = columns.find(row, "tags")
        if found is not ABSENT and found is not None:
            tags = _tag_names(found, opened.options)
            if len(tags) != len(words):
                raise Unusable("bad-tags", f"{len(words)} words in 'tokens' and {len(tags)} tags; expected as many")
            fields["tags"] = _in_iob2(tags, scheme, opened, where)
        return [{**fields, **columns.extras(row)}]

    yield from opened.read_each(convert)


def _mapping(fields: Any) -> Mapping[str, Any]:
    return fields if isinstance(fields, Mapping) else {}


def _from_parts(parts_of: Callable[[Any, str], list[Part]]) -> Callable[[Opened], Iterator[Record]]:
    def read(opened: Opened) -> Iterator[Record]:
        columns = Columns(_SHAPE, opened.options)

        def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
            text = columns.text(row, "text")
            offsets = _given_offsets(row.get("tokens"), text) or split_words(text)
            if not offsets:
                raise Unusable("empty", "column 'text' has no words")
            fields: dict[str, Any] = {
                "tokens": [text[start:end] for start, end in offsets],
                "text": text,
                "offsets": [[start, end] for start, end in offsets],
            }
            found = columns.find(row, "entities")
            if found is not ABSENT and found is not None:
                tags, widened, left_out = tags_of_parts(offsets, parts_of(found, text))
                fields["tags"] = tags
                for kind, parts in (("entity-widened", widened), ("entity-overlapping", left_out)):
                    for start, end, name in parts:
                        opened.note(kind, f"{where}: {name} {text[start:end]!r} in {text!r:.80}")
            return [{**fields, **columns.extras(row)}]

        yield from opened.read_each(convert)

    return read


def _given_offsets(tokens: Any, text: str) -> list[tuple[int, int]]:
    """Words that a file marks itself, as Prodigy and spaCy do."""
    if not isinstance(tokens, list) or not all(isinstance(item, Mapping) for item in tokens):
        return []
    try:
        offsets = [(int(item["start"]), int(item["end"])) for item in tokens]
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable("bad-tokens", "column 'tokens' holds objects; expected start and end in each") from error
    ordered = all(a[1] <= b[0] for a, b in pairwise(offsets))
    if not ordered or any(not 0 <= start < end <= len(text) for start, end in offsets):
        raise Unusable("bad-tokens", "column 'tokens' holds words out of order, empty, or beyond the text")
    return offsets


def _is_cluener(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    columns = Columns(_SHAPE, options)
    found = [columns.find(row, "entities") for row in head if columns.has(row, "text", "entities")]
    return any(isinstance(value, Mapping) for value in found)


def _is_spans(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    columns = Columns(_SHAPE, options)
    found = [columns.find(row, "entities") for row in head if columns.has(row, "text", "entities")]
    return any(isinstance(value, list) for value in found)


def _only_text(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
    columns = Columns(_SHAPE, options)
    marked = any(columns.has(row, "entities") and columns.find(row, "entities") is not None for row in head)
    return not marked and any(columns.has(row, "text") for row in head)


TAGGED: tuple[Format, ...] = (
    Format(
        "conll",
        "lines",
        "one word a line, its tag in the last column (or data.columns: {tags: 3}), a blank line between sentences",
        (),
        _looks_like_conll,
        _from_conll,
    ),
    Format(
        "cluener",
        "rows",
        "text, and label: {type: {mention: [[first, last]]}}",
        ("text", "label"),
        _is_cluener,
        _from_parts(cluener_parts),
    ),
    Format(
        "spans",
        "rows",
        "text, and entities: [{start, end, label}] or [[start, end, label]] (also spans, label)",
        ("text", "entities"),
        _is_spans,
        _from_parts(listed_parts),
    ),
    Format(
        "tokens",
        "rows",
        "tokens, and tags or ner_tags: names, or numbers with data.names",
        ("tokens", "tags"),
        looks_like_rows(_SHAPE, "tokens"),
        _from_tokens,
    ),
    Format("spans_text", "rows", "text alone, to predict on", ("text",), _only_text, _from_parts(listed_parts)),
)
