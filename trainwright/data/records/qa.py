"""Questions about a text whose answers are spans of it: SQuAD 1 and 2, CMRC 2018, and flat rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainwright.data.records.columns import ABSENT, Columns, as_text, describe
from trainwright.data.records.opened import Format, Opened, Options
from trainwright.data.records.record import SHAPES, Record, Unusable
from trainwright.data.records.tables import looks_like_rows

__all__ = ["QA", "locate"]

_SHAPE = SHAPES["qa"]
_EDGES = " \t\r\n\u3000。，、；：！？,.;:!?\"'“”‘’《》"
"""What annotators put before or behind an answer without its being in the text."""
_TRUTHS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def locate(context: str, answer: str, start: int) -> tuple[int, str] | None:
    """Where an answer truly stands: at `start`, else at the nearest place where the text has it, else the same without
    the marks at its edges. None when the text does not have it. A negative `start` is an unknown one.
    """
    if start >= 0 and answer and context[start : start + len(answer)] == answer:
        return start, answer
    for wanted in (answer, answer.strip(_EDGES)):
        places = []
        place = context.find(wanted) if wanted else -1
        while place >= 0:
            places.append(place)
            place = context.find(wanted, place + 1)
        if places:
            return min(places, key=lambda found: abs(found - max(start, 0))), wanted
    return None


def _written_answers(value: Any) -> list[tuple[str, int]]:
    """(text, start) of answers as a list of objects, an object of lists, or bare texts; a start of -1 is not given."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text", []), value.get("answer_start", [])
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if isinstance(texts, list) and starts in ([], None):
            starts = [-1] * len(texts)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise Unusable("bad-answers", f"column 'answers' is {describe(value)}; expected as many texts as starts")
        return [_answer(text, start) for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, (str, int, float)):
        value = [value]
    if not isinstance(value, list):
        raise Unusable("bad-answers", f"column 'answers' is {describe(value)}; expected {{text, answer_start}}")
    return [
        _answer(item.get("text"), item.get("answer_start", -1)) if isinstance(item, Mapping) else _answer(item, -1)
        for item in value
    ]


def _answer(text: Any, start: Any) -> tuple[str, int]:
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)  # CMRC 2018 holds answers that a spreadsheet took for numbers
    if isinstance(start, str) and re.fullmatch(r"\d{1,18}", start):  # a cell of a table
        start = int(start)
    if isinstance(start, bool) or not isinstance(start, int):
        raise Unusable("bad-answers", f"an answer's start is {describe(start)}; expected a character from 0")
    return as_text(text, "answers"), start


def _located(written: Sequence[tuple[str, int]], context: str, opened: Opened, where: str) -> dict[str, list[Any]]:
    """Answers where the text has them. Wrong places are mended and counted; answers that the text has not are dropped
    and counted; Unusable where none is left."""
    texts: list[str] = []
    starts: list[int] = []
    for text, start in written:
        found = locate(context, text, start)
        seen = f"answer {text!r:.60} is not at character {start}" if start >= 0 else f"answer {text!r:.60} is not there"
        if found is None:
            elsewhere = ", nor elsewhere in the text" if start >= 0 else ""
            opened.note("answer-dropped", f"{where}: {seen}{elsewhere}")
            continue
        if (start >= 0 and found != (start, text)) or (start < 0 and found[1] != text):
            opened.note("offset-repaired", f"{where}: {seen}; found {found[1]!r:.60} at {found[0]}")
        starts.append(found[0])
        texts.append(found[1])
    if written and not texts:
        if not any(text for text, _ in written):
            hint = "a question without an answer has is_impossible: true, or an empty list of answers"
            raise Unusable("answer-not-found", "the answer is empty; expected a part of the context", hint)
        text, start = written[0]
        place = f" should be at {start}" if start >= 0 else ""
        raise Unusable(
            "answer-not-found",
            f"no answer stands in the text ({text!r:.60}{place})",
            "offsets are in characters from 0; answers must be parts of the context",
        )
    return {"text": texts, "answer_start": starts}


def _with_answers(
    fields: dict[str, Any], answers: Any, impossible: Any, opened: Opened, where: str, *, empty_is_impossible: bool
) -> dict[str, Any]:
    """A record with what is known of its answer."""
    impossible = _truth(impossible)
    if impossible:
        return {**fields, "answers": {"text": [], "answer_start": []}, "is_impossible": True}
    if answers is ABSENT or answers is None:
        return fields
    written = _written_answers(answers)
    if not written:
        if impossible is None and not empty_is_impossible:
            return fields  # a test set whose answers are kept back
        return {**fields, "answers": {"text": [], "answer_start": []}, "is_impossible": True}
    known = {} if impossible is None else {"is_impossible": False}
    return {**fields, "answers": _located(written, fields["context"], opened, where), **known}


def _truth(value: Any) -> bool | None:
    """`is_impossible` as it is, or as a table or a number says it; None where it is not given."""
    key = value.strip().lower() if isinstance(value, str) else value
    if key is ABSENT or key is None or key == "":
        return None
    if isinstance(key, (bool, int, float, str)) and key in _TRUTHS:
        return _TRUTHS[key]
    raise Unusable("bad-answers", f"column 'is_impossible' is {describe(value)}; expected true or false")


def _from_rows(opened: Opened) -> Iterator[Record]:
    columns = Columns(_SHAPE, opened.options)

    def convert(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        fields: dict[str, Any] = {
            "id": str(columns.extras(row).get("id", where)),
            "context": columns.text(row, "context"),
            "question": columns.text(row, "question"),
        }
        title = columns.find(row, "title")
        if isinstance(title, str) and title:
            fields["title"] = title
        answers = columns.find(row, "answers")
        if isinstance(answers, str) and row.get("answer_start") not in (None, ""):
            answers = {"text": [answers], "answer_start": [row["answer_start"]]}
        impossible = columns.find(row, "is_impossible")
        return [_with_answers(fields, answers, impossible, opened, where, empty_is_impossible=True)]

    yield from opened.read_each(convert)


def _from_articles(opened: Opened) -> Iterator[Record]:
    """Articles of paragraphs of questions (SQuAD), or paragraphs of questions (CMRC 2018's own files)."""
    columns = Columns(_SHAPE, opened.options)
    for row in opened.rows():
        assert not isinstance(row.fields, str)  # rows() gives mappings only
        article = row.fields
        paragraphs = article.get("paragraphs", [article])
        if not isinstance(paragraphs, list):
            error = Unusable("bad-paragraphs", f"'paragraphs' is {describe(paragraphs)}; expected a list")
            opened.report(row.where, error)
            continue
        for number, paragraph in enumerate(paragraphs, start=1):
            place = f"{row.where}, paragraph {number}" if "paragraphs" in article else row.where
            try:
                context, questions = _paragraph(paragraph, columns)
            except Unusable as error:
                opened.report(place, error)
                continue
            for index, question in enumerate(questions, start=1):
                where = f"{place}, question {index}"
                try:
                    fields = _question(question, context, article.get("title"), columns, opened, where)
                except Unusable as error:
                    opened.report(where, error)
                    continue
                yield Record(fields, where, f"{row.key}/{number}/{index}")


def _paragraph(paragraph: Any, columns: Columns) -> tuple[str, list[Any]]:
    if not isinstance(paragraph, Mapping):
        raise Unusable("bad-paragraphs", f"a paragraph is {describe(paragraph)}; expected context and qas")
    questions = paragraph.get("qas")
    if not isinstance(questions, list):
        raise Unusable("bad-paragraphs", f"'qas' is {describe(questions)}; expected a list of questions")
    return columns.text(paragraph, "context"), questions


def _question(question: Any, context: str, title: Any, columns: Columns, opened: Opened, where: str) -> dict[str, Any]:
    if not isinstance(question, Mapping):
        raise Unusable("bad-question", f"a question is {describe(question)}; expected an object with 'question'")
    fields: dict[str, Any] = {
        "id": str(columns.extras(question).get("id", where)),
        "context": context,
        "question": columns.text(question, "question"),
    }
    if isinstance(title, str) and title:
        fields["title"] = title
    answers = columns.find(question, "answers")
    impossible = columns.find(question, "is_impossible")
    return _with_answers(fields, answers, impossible, opened, where, empty_is_impossible=False)


def _has_questions(*keys: str) -> Any:
    def matches(head: Sequence[Mapping[str, Any]], options: Options) -> bool:
        return any(isinstance(row.get(key), list) for row in head for key in keys)

    return matches


QA: tuple[Format, ...] = (
    Format(
        "squad",
        "rows",
        "data: [{title, paragraphs: [{context, qas: [{id, question, answers, is_impossible}]}]}] (SQuAD 1 and 2)",
        ("data", "paragraphs", "qas"),
        _has_questions("paragraphs"),
        _from_articles,
    ),
    Format(
        "cmrc",
        "rows",
        "[{context_text, qas: [{query_id, query_text, answers}]}] (CMRC 2018); answers without their places",
        ("context_text", "qas"),
        _has_questions("qas"),
        _from_articles,
    ),
    Format(
        "qa",
        "rows",
        "context, question, and answers: {text: [...], answer_start: [...]}",
        ("context", "question", "answers"),
        looks_like_rows(_SHAPE, "context", "question"),
        _from_rows,
    ),
)
