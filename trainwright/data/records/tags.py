"""Tag schemes of named entities: which a file is written in, and exact conversion between them.

Spans are (first word, word after the last, type). The reading of sequences that a scheme forbids is that of `conlleval`
(Tjong Kim Sang and Buchholz 2000): a new entity begins wherever the type changes or no entity is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainwright.base.errors import DataError
from trainwright.base.text import did_you_mean

__all__ = ["SCHEMES", "Span", "convert_tags", "detect_scheme", "tags_of", "to_spans", "violations"]

Span = tuple[int, int, str]

SCHEMES: dict[str, str] = {
    "iob2": "B- begins every entity, I- goes on (also called BIO)",
    "iob1": "I- is inside; B- begins an entity only behind another of its type (CoNLL 2003)",
    "bioes": "B- begins, I- goes on, E- ends, S- is a single word",
    "bmes": "the same with M- for I-",
    "bilou": "the same with L- for E- and U- for S-",
    "io": "the bare type for every word of an entity; neighbours of one type are one entity",
    "words": "a class for every word (parts of speech); kept as they are",
}
_CANONICAL = {
    "iob1": {"B": "B", "I": "I"},
    "iob2": {"B": "B", "I": "I"},
    "bioes": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "bmes": {"B": "B", "M": "I", "E": "E", "S": "S"},
    "bilou": {"B": "B", "I": "I", "L": "E", "U": "S"},
}
_WRITTEN = {name: {ours: theirs for theirs, ours in letters.items()} for name, letters in _CANONICAL.items()}
_PREFIXES = frozenset("BIEMSLU")


def _split(tag: str, prefixes: Iterable[str]) -> tuple[str, str] | None:
    """(prefix, type) of `B-PER`, `B_PER` or a bare `B`; None when it has no such prefix."""
    if tag[:1] in prefixes and (len(tag) == 1 or tag[1] in "-_"):
        return tag[0], tag[2:]
    return None


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme of a whole file: by its prefixes, and between IOB1 and IOB2 by where I- and B- stand.

    A file whose tags have no prefixes is "io" where some word is outside of all entities (O), and else "words".
    """
    letters: set[str] = set()
    outside = False
    prefixed = bare = iob1 = iob2 = 0
    for tags in sentences:
        before = ("O", "")
        for tag in tags:
            if tag == "O":
                outside, before = True, ("O", "")
                continue
            parts = _split(tag, _PREFIXES)
            if parts is None:
                bare += 1
                before = ("O", "")
                continue
            prefixed += 1
            letters.add(parts[0])
            goes_on = before[0] != "O" and before[1] == parts[1]
            iob2 += parts[0] == "I" and not goes_on
            iob1 += parts[0] == "B" and not goes_on
            before = parts
    if bare >= prefixed:  # one bare tag among many with prefixes is a slip, reported where it stands
        return "io" if outside else "words"
    if "M" in letters:
        return "bmes"
    if letters & {"L", "U"}:
        return "bilou"
    if letters & {"E", "S"}:
        return "bioes"
    return "iob1" if iob2 and iob1 < iob2 else "iob2"


def _parsed(tags: Sequence[str], scheme: str) -> list[tuple[str, str]]:
    """(B, I, E, S or O, type) of every tag. Raises DataError for a tag that the scheme does not have."""
    letters = _CANONICAL[scheme]
    parsed = []
    for position, tag in enumerate(tags):
        if tag == "O":
            parsed.append(("O", ""))
            continue
        parts = _split(tag, letters)
        if parts is None:
            names = ", ".join(f"{letter}-type" for letter in letters)
            raise DataError(
                f"tag {tag!r} of word {position + 1} is not of the scheme {scheme}; expected {names} or O",
                hint=f"name the scheme: one of {', '.join(SCHEMES)}",
            )
        parsed.append((letters[parts[0]], parts[1]))
    return parsed


def to_spans(tags: Sequence[str], scheme: str = "iob2") -> list[Span]:
    """The entities of a sentence. Raises DataError for an unknown scheme or a tag that it does not have."""
    _check(scheme)
    if scheme in ("io", "words"):
        parsed = [("O", "") if tag == "O" else ("I", tag) for tag in tags]
    else:
        parsed = _parsed(tags, scheme)
    spans: list[Span] = []
    start = -1
    before = ("O", "")
    for position, (letter, kind) in enumerate([*parsed, ("O", "")]):
        if start >= 0 and (letter in "BSO" or before[0] in "ES" or kind != before[1]):
            spans.append((start, position, before[1]))
            start = -1
        if letter != "O" and start < 0:
            start = position
        before = (letter, kind)
    return spans


def violations(tags: Sequence[str], scheme: str = "iob2") -> list[int]:
    """Numbers (from 0) of the tags that the scheme forbids where they stand, or that should have been an entity's end;
    `to_spans` reads such sequences as conlleval does."""
    _check(scheme)
    if scheme in ("iob1", "io", "words"):
        if scheme == "iob1":
            _parsed(tags, scheme)
        return []  # every sequence of these is an entity or none
    wrong = []
    before = ("O", "")
    closes = scheme != "iob2"
    for position, (letter, kind) in enumerate([*_parsed(tags, scheme), ("O", "")]):
        is_open = before[0] in "BI"
        goes_on = letter in "IE"
        if goes_on and not (is_open and kind == before[1]):
            wrong.append(position)
        elif closes and is_open and not goes_on:
            wrong.append(position - 1)
        before = (letter, kind)
    return wrong


def tags_of(spans: Iterable[Span], words: int, scheme: str = "iob2") -> list[str]:
    """Tags of a sentence of `words` words from entities that do not overlap. Raises DataError."""
    _check(scheme)
    tags = ["O"] * words
    ends: dict[int, str] = {}
    for start, end, kind in sorted(spans):
        if not 0 <= start < end <= words or any(tag != "O" for tag in tags[start:end]):
            raise DataError(
                f"an entity {kind!r} of words {start} to {end} overlaps another or leaves the {words} words",
                hint="flat tags hold one entity a word",
            )
        if scheme in ("io", "words"):
            tags[start:end] = [kind] * (end - start)
            continue
        written = _WRITTEN[scheme]
        letters = ["I"] * (end - start)
        if scheme != "iob1" or ends.get(start) == kind:
            letters[0] = "B"
        if "E" in written:
            letters[-1] = "S" if len(letters) == 1 else "E"
        suffix = f"-{kind}" if kind else ""
        tags[start:end] = [written[letter] + suffix for letter in letters]
        ends[end] = kind
    return tags


def convert_tags(tags: Sequence[str], source: str, target: str = "iob2") -> list[str]:
    """Tags of one scheme in another; between schemes that tell neighbours apart nothing is lost."""
    _check(target)
    if source == "words" or (source == target == "iob2" and not violations(tags, source)):
        return list(tags)
    return tags_of(to_spans(tags, source), len(tags), target)


def _check(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise DataError(f"tag scheme {scheme!r}; expected one of {', '.join(SCHEMES)}.{did_you_mean(scheme, SCHEMES)}")
