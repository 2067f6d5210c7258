"""Words of a text, and marked parts of a text as tags of its words."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Iterable, Sequence

from trainwright.data.records.tags import Span, tags_of, to_spans

__all__ = ["Part", "join_words", "parts_of_tags", "split_words", "tags_of_parts"]

Part = tuple[int, int, str]
"""(first character, character after the last, type) of a marked part of a text."""

_IDEOGRAPHS = (
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


def _kind(character: str) -> str:
    """What a character makes words with: " " none, "1" digits, "a" letters and marks, "" stands alone."""
    if character.isspace():
        return " "
    if character.isascii():
        return "1" if character.isdigit() else "a" if character.isalpha() else ""
    code = ord(character)
    if any(first <= code <= last for first, last in _IDEOGRAPHS):
        return ""
    category = unicodedata.category(character)
    return "1" if category == "Nd" else "a" if category[0] in "LM" else ""


def split_words(text: str) -> list[tuple[int, int]]:
    """(start, end) of every word in characters: runs of letters, runs of digits, and every other character that is
    no space alone. Chinese characters and kana stand alone, since no spaces part their words.
    """
    words: list[tuple[int, int]] = []
    start = 0
    before = " "
    for position, character in enumerate(text):
        kind = _kind(character)
        if kind == before and kind in ("a", "1"):
            continue
        if before != " ":
            words.append((start, position))
        start, before = position, kind
    if before != " ":
        words.append((start, len(text)))
    return words


def join_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A text of words and where they stand in it: a space between two, but none beside a Chinese character or kana."""
    pieces: list[str] = []
    offsets = []
    length = 0
    for word in words:
        if pieces and word and pieces[-1] and not (_stands_alone(pieces[-1][-1]) or _stands_alone(word[0])):
            pieces.append(" ")
            length += 1
        offsets.append((length, length + len(word)))
        pieces.append(word)
        length += len(word)
    return "".join(pieces), offsets


def _stands_alone(character: str) -> bool:
    return not character.isascii() and unicodedata.east_asian_width(character) in "WF"


def tags_of_parts(
    offsets: Sequence[tuple[int, int]], parts: Iterable[Part]
) -> tuple[list[str], list[Part], list[Part]]:
    """IOB2 tags of words; the parts that were widened to whole words; those left out because a longer one covers them.

    Flat tags hold one entity a word: of parts that overlap the longest stays (then the first).
    """
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    widened: list[Part] = []
    left_out: list[Part] = []
    taken = [False] * len(offsets)
    spans: list[Span] = []
    for start, end, kind in sorted(parts, key=lambda part: (part[0] - part[1], part[0])):
        first = bisect.bisect_right(ends, start)
        last = bisect.bisect_left(starts, end)
        if first >= last or any(taken[first:last]):
            left_out.append((start, end, kind))
            continue
        if starts[first] != start or ends[last - 1] != end:
            widened.append((start, end, kind))
        taken[first:last] = [True] * (last - first)
        spans.append((first, last, kind))
    return tags_of(spans, len(offsets)), widened, left_out


def parts_of_tags(offsets: Sequence[tuple[int, int]], tags: Sequence[str]) -> list[Part]:
    """Marked parts of a text from the IOB2 tags of its words."""
    return [(offsets[first][0], offsets[last - 1][1], kind) for first, last, kind in to_spans(tags)]
