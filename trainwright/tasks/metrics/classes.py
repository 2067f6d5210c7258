"""Accuracy, precision, recall and F1 of classes, as scikit-learn defines them (undefined ratios are 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.tasks.task import Table

__all__ = ["ClassScores", "averages", "confusion_matrix", "matthews", "ratios", "scores_table", "several", "single"]

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall, F1 and the number of true instances ("support"), one for each class."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: Counts


def ratios(correct: Any, predicted: Any, true: Any) -> ClassScores:
    """Scores of counts [L]: correct predictions, all predictions, and true instances of each class."""
    correct, predicted, true = (np.asarray(counts, dtype=np.int64) for counts in (correct, predicted, true))
    both = predicted + true  # F1 = 2 TP / (2 TP + FP + FN): the same number without the two divisions
    return ClassScores(_divide(correct, predicted), _divide(correct, true), _divide(2 * correct, both), true)


def _divide(above: Any, below: Any) -> NDArray[np.float64]:
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def averages(scores: ClassScores, correct: int, predicted: int) -> dict[str, tuple[float, float, float]]:
    """(precision, recall, F1) by kind of mean: "micro" over all instances, "macro" over classes, "weighted" by support.

    `correct` and `predicted` are totals over the classes.
    """
    total = int(scores.support.sum())
    whole = ratios(correct, predicted, total)
    share = scores.support / total if total else np.zeros(len(scores.support))
    parts = (scores.precision, scores.recall, scores.f1)
    return {
        "micro": (float(whole.precision), float(whole.recall), float(whole.f1)),
        "macro": _three(float(part.mean()) if len(part) else 0.0 for part in parts),
        "weighted": _three(float((part * share).sum()) for part in parts),
    }


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def confusion_matrix(true: Sequence[int], predicted: Sequence[int], classes: int) -> Counts:
    """Counts [true, predicted] of classes numbered from 0."""
    cells = np.asarray(true, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def matthews(confusion: Counts) -> float:
    """The correlation of true and predicted classes (Matthews 1975; Gorodkin 2004 for many classes), 0 if undefined."""
    true, predicted = confusion.sum(1).astype(np.float64), confusion.sum(0).astype(np.float64)
    total = float(true.sum())
    covariance = float(np.trace(confusion)) * total - float(true @ predicted)
    spread = float(np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true)))
    return covariance / spread if spread > 0 else 0.0


def single(
    true: Sequence[int], predicted: Sequence[int], names: Sequence[str]
) -> tuple[dict[str, float], Table, Counts]:
    """Metrics, the table of scikit-learn's `classification_report`, and the confusion matrix, of one label a text.

    Classes that are neither true nor predicted anywhere do not count in the means, as there.
    """
    confusion = confusion_matrix(true, predicted, len(names))
    correct, of_true, of_predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    there = np.flatnonzero(of_true + of_predicted).tolist()
    scores = ratios(correct[there], of_predicted[there], of_true[there])
    means = averages(scores, int(correct.sum()), int(of_predicted.sum()))
    total = int(confusion.sum())
    accuracy = float(correct.sum()) / total if total else 0.0
    micro = means.pop("micro")  # of one label a text all three are the accuracy, and stand last
    metrics = {"accuracy": accuracy, **_named(means), "matthews": matthews(confusion), **_named({"micro": micro})}
    table = scores_table("classes", [names[index] for index in there], scores, means, kinds=("macro", "weighted"))
    summary = ("accuracy", "", "", accuracy, total)
    rows = (*table.rows[: len(there)], summary, *table.rows[len(there) :])
    return metrics, Table(table.title, table.columns, rows), confusion


def several(true: Any, predicted: Any, names: Sequence[str]) -> tuple[dict[str, float], Table]:
    """Metrics and table of any number of labels for each text; true and predicted are [texts, classes] of 0 and 1.

    "accuracy" is the share of texts of which every label is right; "hamming_loss" the share of wrong single decisions.
    """
    true, predicted = np.asarray(true, dtype=bool), np.asarray(predicted, dtype=bool)
    scores = ratios((true & predicted).sum(0), predicted.sum(0), true.sum(0))
    means = averages(scores, int((true & predicted).sum()), int(predicted.sum()))
    of_texts = ratios((true & predicted).sum(1), predicted.sum(1), true.sum(1))
    means["samples"] = _three(float(part.mean()) for part in (of_texts.precision, of_texts.recall, of_texts.f1))
    metrics = {
        **_named(means),
        "accuracy": float((true == predicted).all(1).mean()),
        "hamming_loss": float((true != predicted).mean()),
    }
    table = scores_table("labels", names, scores, means, kinds=("micro", "macro", "weighted", "samples"))
    return metrics, table


def _named(means: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """Flat metrics, the F1s in front."""
    whats = (("f1", 2), ("precision", 0), ("recall", 1))
    return {f"{what}_{kind}": values[index] for what, index in whats for kind, values in means.items()}


def scores_table(
    title: str,
    names: Sequence[str],
    scores: ClassScores,
    means: dict[str, tuple[float, float, float]],
    kinds: Sequence[str],
) -> Table:
    """The table that people know: a row for each class, then one for each kind of mean."""
    total = int(scores.support.sum())
    rows: list[tuple[Any, ...]] = [
        (name, float(p), float(r), float(f), int(n))
        for name, p, r, f, n in zip(names, scores.precision, scores.recall, scores.f1, scores.support, strict=True)
    ]
    rows += [(f"{kind} avg", *means[kind], total) for kind in kinds]
    return Table(title, ("", "precision", "recall", "f1", "support"), tuple(rows))
