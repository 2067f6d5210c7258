"""Which source each draw comes from, and which row of it: mixtures and epochs as pure functions of the draw number.

Draw k (0, 1, 2, ... over the whole run, all ranks together) is located in two steps:

1. `Mixture` says which source draw k belongs to and the how-manieth draw of that source it is. After every k draws each
   source was drawn within one of weight * k times (Tijdeman, "The chairman assignment problem", 1980).
2. `RowOrder` turns the n-th draw of a source of R rows into its epoch n // R and, through that epoch's keyed
   permutation, a row. A source that is exhausted starts its next epoch with a new permutation, whatever the others
   do; nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import ConfigError
from trainwright.data.permutation import Permutation

__all__ = ["Mixture", "RowGroup", "RowOrder"]

# The schedule repeats after this many draws at most: 0.5 MB of table. Weights whose common denominator is larger are
# rounded to this many parts (relative error of a weight of 1 %: below 0.1 %); `Mixture.weights` tells the truth.
MAX_PERIOD = 1 << 16


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of a split that are drawn as one source. `weight` None: as many draws as it has rows."""

    name: str
    first_row: int
    rows: int
    weight: float | None = None


class Mixture:
    """A low-discrepancy schedule over sources, periodic, so that any draw is located in O(1).

    Args:
        weights: one positive number per source; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights):
            raise ConfigError(
                f"mixture weights must be positive numbers, got {list(weights)}",
                hint="leave a source out instead of giving it the weight 0",
            )
        self.parts = _parts(weights)
        self.period = sum(self.parts)
        self.weights = [part / self.period for part in self.parts]
        self._source, self._nth = _schedule(self.parts)

    def locate(self, draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each draw number: its source, and how many draws of that source came before it."""
        period, place = np.divmod(draws, self.period)
        source = self._source[place]
        return source.astype(np.int64), period * np.asarray(self.parts, dtype=np.int64)[source] + self._nth[place]


class RowOrder:
    """The row of every draw: a pure function of (groups, seed, draw number).

    Groups without a weight are drawn in proportion to their rows, which makes every epoch of all of them end together.
    """

    def __init__(self, groups: Sequence[RowGroup], seed: int) -> None:
        self.groups = [group for group in groups if group.rows > 0]
        if not self.groups:
            raise ConfigError("the dataset has no rows to draw", hint="see `trainwright data inspect FOLDER`")
        self.seed = seed
        self.rows = sum(group.rows for group in self.groups)
        self._permutations: dict[tuple[int, int], Permutation] = {}
        if len(self.groups) > 1:
            total = sum(group.rows for group in self.groups)
            self._mixture: Mixture | None = Mixture(
                [g.rows / total if g.weight is None else g.weight for g in self.groups]
            )
        else:
            self._mixture = None

    @property
    def weights(self) -> dict[str, float]:
        """The share of draws that each group really gets."""
        shares = self._mixture.weights if self._mixture else [1.0]
        return {group.name: share for group, share in zip(self.groups, shares, strict=True)}

    def locate(self, draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each draw: its row in the split, and the epoch of its group. Both int64 [draws]."""
        draws = np.asarray(draws, dtype=np.int64)
        if self._mixture is None:
            source, nth = np.zeros_like(draws), draws
        else:
            source, nth = self._mixture.locate(draws)
        rows = np.empty_like(draws)
        epochs = np.empty_like(draws)
        for number in np.unique(source).tolist():
            group = self.groups[number]
            mine = source == number
            epoch, place = np.divmod(nth[mine], group.rows)
            row = np.empty_like(place)
            for one in np.unique(epoch).tolist():
                here = epoch == one
                row[here] = self._permutation(number, one)(place[here])
            rows[mine] = row + group.first_row
            epochs[mine] = epoch
        return rows, epochs

    def __call__(self, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row in the split of each draw."""
        return self.locate(draws)[0]

    def _permutation(self, number: int, epoch: int) -> Permutation:
        key = (number, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 4 * len(self.groups):
                self._permutations.clear()
            group = self.groups[number]
            self._permutations[key] = Permutation(group.rows, self.seed, "rows", group.name, epoch)
        return self._permutations[key]


def _parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights: exact where their sum stays within MAX_PERIOD, else the nearest."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    total = sum(whole)
    if total <= MAX_PERIOD:
        return whole
    # largest remainder, each source at least one part
    shares = [number * MAX_PERIOD / total for number in whole]
    parts = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i], i))
    for i in by_remainder[: max(0, MAX_PERIOD - sum(parts))]:
        parts[i] += 1
    divisor = math.gcd(*parts)
    return [part // divisor for part in parts]


def _schedule(parts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """One period: the source of each draw and its number within the source, by Tijdeman's rule.

    Before draw k (from 1) source s is owed x_s = w_s * k - c_s. Among the sources owed at least 1 / (2S - 2), the one
    goes first that would be the first to be owed more than 1 - 1 / (2S - 2). Then |w_s * k - c_s| < 1 for all k.
    All numbers are scaled by the period, so that the owed amounts are whole.
    """
    period, sources = sum(parts), len(parts)
    source = np.zeros(period, dtype=np.int32)
    nth = np.arange(period, dtype=np.int64)
    if sources == 1:
        return source, nth
    share = np.asarray(parts, dtype=np.int64)
    slack = 2 * sources - 2
    owed = np.zeros(sources, dtype=np.int64)
    counts = np.zeros(sources, dtype=np.int64)
    for k in range(period):
        owed += share
        deadline = np.where(owed * slack >= period, (period - period / slack - owed) / share, np.inf)
        chosen = int(np.argmin(deadline))
        source[k], nth[k] = chosen, counts[chosen]
        counts[chosen] += 1
        owed[chosen] -= period
    return source, nth
