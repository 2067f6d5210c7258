"""How near predicted numbers are to true ones: Pearson, Spearman, squared and absolute error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["number_scores", "pearson", "ranks", "spearman"]


def pearson(x: Any, y: Any) -> float:
    """Linear correlation of two lists of numbers; 0 where one of them is constant, which has none."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if (x == x[0]).all() or (y == y[0]).all():  # the mean of equal numbers is rounded: nothing may be read off the rest
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else 0.0


def ranks(x: Any) -> NDArray[np.float64]:
    """Ranks from 1; equal numbers share the mean of their places."""
    _, inverse, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean


def spearman(x: Any, y: Any) -> float:
    """Correlation of ranks."""
    return pearson(ranks(x), ranks(y))


def number_scores(true: Any, predicted: Any) -> dict[str, float]:
    """pearson, spearman, mse, mae and r2 of predicted against true numbers, of which there is one at least.

    r2 of constant true numbers is 1 where all are met and else 0, as scikit-learn has it.
    """
    true, predicted = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    error = predicted - true
    spread = 0.0 if (true == true[0]).all() else float(((true - true.mean()) ** 2).sum())
    return {
        "pearson": pearson(true, predicted),
        "spearman": spearman(true, predicted),
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": 1.0 - float((error**2).sum()) / spread if spread > 0 else float(not error.any()),
    }
