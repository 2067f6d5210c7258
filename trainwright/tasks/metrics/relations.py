"""Scores of relations: the official ones of SemEval-2010 task 8, and the usual ones that leave out "no relation"."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trainwright.tasks.metrics.classes import averages, ratios, scores_table
from trainwright.tasks.task import Table

__all__ = ["directed", "relation_scores", "undirected"]

_DIRECTED = re.compile(r"(?P<name>.+)\((?:e1,\s*e2|e2,\s*e1)\)")


def undirected(relation: str) -> str:
    """ "Cause-Effect" of "Cause-Effect(e2,e1)"; a relation without direction is itself."""
    match = _DIRECTED.fullmatch(relation)
    return match["name"] if match else relation


def directed(names: Sequence[str]) -> bool:
    """Whether any of these relations is written with its direction."""
    return any(_DIRECTED.fullmatch(name) for name in names)


def relation_scores(true: Sequence[str], predicted: Sequence[str], other: str | None) -> tuple[dict[str, float], Table]:
    """Metrics and the table by relation, without `other`, the name of what is no relation of interest.

    This is the (9+1)-way evaluation of SemEval-2010 task 8 with directionality taken into account (Hendrickx et al.
    2010): both directions of a relation are one row; a right relation in the wrong direction is not correct, and counts
    among what was predicted of it. "f1_macro" is the mean of the F1s of the relations that are true somewhere: the
    official score. Relations without direction are scored in the same way, as single classes.
    """
    kinds = sorted({undirected(name) for name in true} - {other})
    row = {kind: index for index, kind in enumerate(kinds)}
    correct, guessed, real = (np.zeros(len(kinds), dtype=np.int64) for _ in range(3))
    stray = 0  # predicted relations that are true nowhere: in no row, and wrong
    for expected, given in zip(true, predicted, strict=True):
        if (kind := undirected(expected)) in row:
            real[row[kind]] += 1
            correct[row[kind]] += expected == given
        if (kind := undirected(given)) in row:
            guessed[row[kind]] += 1
        elif kind != other:
            stray += 1
    scores = ratios(correct, guessed, real)
    means = averages(scores, int(correct.sum()), int(guessed.sum()) + stray)
    total = len(true)
    right = sum(a == b for a, b in zip(true, predicted, strict=True))
    metrics = {
        f"{what}_{kind}": means[kind][index]
        for kind in ("macro", "micro")
        for what, index in (("f1", 2), ("precision", 0), ("recall", 1))
    } | {"accuracy": right / total if total else 0.0}
    table = scores_table("relations", kinds, scores, means, kinds=("micro", "macro"))
    notes = (f"without {other!r}; the right relation in the wrong direction is wrong",) if other is not None else ()
    return metrics, Table(table.title, table.columns, table.rows, notes)
