"""What is wrong with predicted entities: missed, invented, of another type, or with other borders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainwright.tasks.labels import sorted_labels
from trainwright.tasks.metrics.classes import confusion_matrix
from trainwright.tasks.metrics.entities import Entity, entities, split_tag
from trainwright.tasks.task import LISTED_ERRORS, Table

__all__ = ["entity_errors", "pair_entities", "type_confusion"]

KINDS = ("wrong type", "wrong borders", "wrong type and borders", "missed", "spurious")


def pair_entities(
    true: Sequence[Entity], given: Sequence[Entity]
) -> Iterator[tuple[str, Entity | None, Entity | None]]:
    """(kind, expected, predicted) of every entity that is not exactly right.

    A wrong one is paired with one that it overlaps, the same span first, then the same type; each is used once.
    """
    left = [entity for entity in true if entity not in given]
    wrong = [entity for entity in given if entity not in true]
    tests = (
        ("wrong type", lambda a, b: a[1:] == b[1:]),
        ("wrong borders", lambda a, b: a[0] == b[0] and _overlap(a, b)),
        ("wrong type and borders", lambda a, b: _overlap(a, b)),
    )
    for kind, fits in tests:
        for expected in list(left):
            match = next((predicted for predicted in wrong if fits(expected, predicted)), None)
            if match is not None:
                left.remove(expected)
                wrong.remove(match)
                yield kind, expected, match
    for expected in left:
        yield "missed", expected, None
    for predicted in wrong:
        yield "spurious", None, predicted


def _overlap(a: Entity, b: Entity) -> bool:
    return a[1] <= b[2] and b[1] <= a[2]


def entity_errors(
    records: Sequence[Mapping[str, Any]], true: Sequence[Sequence[str]], given: Sequence[Sequence[str]]
) -> tuple[tuple[dict[str, Any], ...], Table]:
    """Every wrong entity with its sentence, and how many there are of each kind."""
    errors: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for record, of_true, of_given in zip(records, true, given, strict=True):
        words = record["tokens"]
        for kind, expected, predicted in pair_entities(entities(of_true), entities(of_given)):
            counts[kind] += 1
            if len(errors) < LISTED_ERRORS:
                place = {key: record[key] for key in ("where", "id") if record.get(key) is not None}
                named = {"expected": _shown(expected, words), "predicted": _shown(predicted, words)}
                errors.append({**place, "kind": kind, **named, "text": " ".join(words)})
    rows = tuple((kind, counts[kind]) for kind in KINDS)
    return tuple(errors), Table("wrong entities", ("", "count"), rows)


def _shown(entity: Entity | None, words: Sequence[str]) -> str | None:
    return None if entity is None else f"{entity[0]}: {' '.join(words[entity[1] : entity[2] + 1])}"


def type_confusion(
    true: Sequence[Sequence[str]], given: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Names, and counts [true, predicted], of the types of single words; "O" is none."""

    def kinds(sequences: Sequence[Sequence[str]]) -> list[str]:
        return ["O" if tag == "O" else split_tag(tag)[1] for tags in sequences for tag in tags]

    of_true, of_given = kinds(true), kinds(given)
    names = ("O", *sorted_labels({*of_true, *of_given} - {"O"}))
    index = {name: number for number, name in enumerate(names)}
    confusion = confusion_matrix([index[k] for k in of_true], [index[k] for k in of_given], len(names))
    found: list[list[int]] = confusion.tolist()
    return names, found
