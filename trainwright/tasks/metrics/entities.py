"""Entities of tag sequences and their scores, equal to seqeval's, whose default mode is that of conlleval.

A tag is "O", or a letter and a type: "B-PER". Entities are (type, first, last), the last word included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from trainwright.base.errors import ConfigError
from trainwright.tasks.metrics.classes import averages, ratios, scores_table
from trainwright.tasks.task import Table

__all__ = ["SCHEMES", "Entity", "entities", "entity_scores", "split_tag", "strict_entities"]

Entity = tuple[str, int, int]
Tag = tuple[str, str]


def split_tag(tag: str) -> Tag:
    """("B", "PER") of "B-PER"; ("O", "_") of "O"."""
    return tag[:1], tag[1:].split("-", maxsplit=1)[-1] or "_"


def entities(tags: Sequence[str]) -> list[Entity]:
    """What conlleval (CoNLL-2000 shared task) reads: every scheme at once, and a best guess for broken sequences.

    An entity begins at B and S, after O, E and S, and wherever the type changes; it ends before any of these.
    """
    found: list[Entity] = []
    before: Tag = ("O", "_")
    first = 0
    for place, tag in enumerate([*tags, "O"]):
        now = split_tag(tag)
        if _ends(before, now):
            found.append((before[1], first, place - 1))
        if _begins(before, now):
            first = place
        before = now
    return found


def _ends(before: Tag, now: Tag) -> bool:
    if before[0] in ("O", "."):
        return False
    return before[0] in ("E", "S") or (before[0] in ("B", "I") and now[0] in ("B", "S", "O")) or before[1] != now[1]


def _begins(before: Tag, now: Tag) -> bool:
    if now[0] in ("B", "S"):
        return True
    if now[0] in ("E", "I") and before[0] in ("E", "S", "O"):
        return True
    return now[0] not in ("O", ".") and before[1] != now[1]


Rule = Callable[[str, str, bool], bool]
"""(letter before, letter now, whether the types are equal) -> whether it holds."""


def _iob1_begins(before: str, now: str, same: bool) -> bool:
    if now == "I":
        return before in ("O", "B") or (before == "I" and not same)
    return now == "B" and before in ("I", "B") and same  # B is written only where two entities of a type touch


def _iob1_ends(before: str, now: str, same: bool) -> bool:
    if now == "I":
        return before in ("B", "I") and not same
    return (before in ("B", "I") and now == "O") or (now == "B" and (before == "I" or (before == "B" and same)))


SCHEMES: dict[str, tuple[str, Rule, Rule, Rule]] = {
    "IOB1": (
        "IOB",
        _iob1_begins,
        lambda before, now, same: before in ("B", "I") and now == "I" and same,
        _iob1_ends,
    ),
    "IOB2": (
        "IOB",
        lambda before, now, same: now == "B",
        lambda before, now, same: before in ("B", "I") and now == "I" and same,
        lambda before, now, same: before in ("B", "I") and (now in ("O", "B") or (now == "I" and not same)),
    ),
    "IOBES": (
        "IOBES",
        lambda before, now, same: now in ("B", "S"),
        lambda before, now, same: before in ("B", "I") and now in ("I", "E") and same,
        lambda before, now, same: before in ("S", "E"),
    ),
    "BILOU": (
        "BILOU",
        lambda before, now, same: now in ("B", "U"),
        lambda before, now, same: before in ("B", "I") and now in ("I", "L") and same,
        lambda before, now, same: before in ("U", "L"),
    ),
}
"""Scheme to its letters, and to what begins an entity, goes on with it, and ends it."""


def strict_entities(tags: Sequence[str], scheme: str) -> list[Entity]:
    """Only what is written exactly as the scheme (a key of SCHEMES) has it: seqeval's strict mode.

    Raises:
        ConfigError: no such scheme, or a letter that it does not have.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"no tagging scheme is called {scheme!r}; known: {', '.join(SCHEMES)}")
    letters, begins, goes_on, ends = SCHEMES[scheme]
    read = [split_tag(tag) for tag in [*tags, "O"]]
    for tag, (letter, _) in zip(tags, read, strict=False):
        if letter not in letters:
            raise ConfigError(f"the tag {tag!r} is not one of {scheme}, which has the letters {', '.join(letters)}")

    def holds(rule: Rule, place: int) -> bool:
        before, now = read[place - 1] if place else ("O", "_"), read[place]
        return rule(before[0], now[0], before[1] == now[1])

    found: list[Entity] = []
    place = 0
    while place < len(tags):
        if not holds(begins, place):
            place += 1
            continue
        last = place + 1
        while holds(goes_on, last):
            last += 1
        if holds(ends, last):
            found.append((read[place][1], place, last - 1))
        place = last
    return found


def entity_scores(
    true: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], scheme: str | None = None
) -> tuple[dict[str, float], Table]:
    """Metrics and the table by type of tag sequences; `scheme` asks for the strict mode.

    "precision", "recall" and "f1" are over all entities (micro), as conlleval prints them.
    """
    correct: dict[str, int] = defaultdict(int)
    guessed: dict[str, int] = defaultdict(int)
    real: dict[str, int] = defaultdict(int)
    words = right = 0
    for expected, given in zip(true, predicted, strict=True):
        words += len(expected)
        right += sum(a == b for a, b in zip(expected, given, strict=True))
        of_true, of_given = (
            set(entities(tags) if scheme is None else strict_entities(tags, scheme)) for tags in (expected, given)
        )
        for group, counts in ((of_true, real), (of_given, guessed), (of_true & of_given, correct)):
            for kind, _, _ in group:
                counts[kind] += 1
    kinds = sorted(real.keys() | guessed.keys())
    scores = ratios(*([counts[kind] for kind in kinds] for counts in (correct, guessed, real)))
    means = averages(scores, sum(correct.values()), sum(guessed.values()))
    metrics = {
        f"{what}{suffix}": means[kind][index]
        for kind, suffix in (("micro", ""), ("macro", "_macro"), ("weighted", "_weighted"))
        for what, index in (("f1", 2), ("precision", 0), ("recall", 1))
    } | {
        "token_accuracy": right / words if words else 0.0,
    }
    return metrics, scores_table("entities", kinds, scores, means, kinds=("micro", "macro", "weighted"))
