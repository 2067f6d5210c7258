"""A keyed permutation of [0, n) in O(1) memory: the order of the rows of an epoch, computed instead of stored.

A Feistel network over pairs (left, right) of numbers below a = ceil(sqrt(n)) permutes [0, a*a); an image that falls
outside [0, n) is permuted again until it falls inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). As a*a < n + 2*sqrt(n) + 1, nearly every value takes one walk. Every step is a bijection, so the
whole is one; nothing is stored, so row 10^12 of epoch 7 costs what row 0 of epoch 0 costs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trainwright.base.seeds import derive_seed

__all__ = ["Permutation"]

# Four rounds make a Feistel network indistinguishable from random in theory (Luby and Rackoff 1988) for big domains;
# eight leave margin. On tiny domains the network is structured whatever the rounds (n = 5, side 3: chi^2/df 5.4 over
# all 120 orders), so the side is at least 8 (chi^2/df about 1; see tests/unit/data/test_permutation.py).
ROUNDS = 8
MIN_SIDE = 8
_MAX_SIZE = 2**63


class Permutation:
    """A bijection on [0, size) chosen by `key`; the same on every machine, process and version of numpy.

    Args:
        size: number of rows, 1 to 2^63.
        key: names and numbers that choose the permutation, such as (seed, "epoch", 3).
    """

    def __init__(self, size: int, *key: str | int) -> None:
        if not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"a permutation needs a size between 1 and 2^63, got {size}")
        self.size = size
        root = math.isqrt(size - 1) + 1  # ceil(sqrt(size)) for size >= 1
        self._side = np.uint64(max(root, MIN_SIDE))
        self._keys = [np.uint64(derive_seed("permutation", round_, *key)) for round_ in range(ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __call__(self, index: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """Where each index goes: int64 of the same shape. Raises IndexError outside [0, size)."""
        return self._walk(index, self._forward)

    def inverse(self, image: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """Which index goes to each image: `inverse(self(i)) == i`."""
        return self._walk(image, self._backward)

    def _walk(self, index: NDArray[np.integer] | int, step: object) -> NDArray[np.int64]:
        assert callable(step)
        given = np.asarray(index)
        flat = np.atleast_1d(given).ravel()
        if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= self.size):
            raise IndexError(f"index outside [0, {self.size}): {int(flat.min())} to {int(flat.max())}")
        values = step(flat.astype(np.uint64))
        limit = np.uint64(self.size)
        outside = np.flatnonzero(values >= limit)
        while outside.size:
            values[outside] = step(values[outside])
            outside = outside[values[outside] >= limit]
        return values.astype(np.int64).reshape(given.shape)

    def _forward(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._side, values % self._side
        for key in self._keys:
            left, right = right, (left + _round(right, key, self._side)) % self._side
        return left * self._side + right

    def _backward(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._side, values % self._side
        for key in reversed(self._keys):
            # + side keeps the difference positive: both terms are below side
            left, right = (right + self._side - _round(left, key, self._side)) % self._side, left
        return left * self._side + right


def _round(value: NDArray[np.uint64], key: np.uint64, side: np.uint64) -> NDArray[np.uint64]:
    """A pseudo-random number below `side` (at most 2^32) for each value: the finaliser of splitmix64, twice keyed."""
    mixed = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27)) ^ key) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # multiply-shift instead of a modulo: unbiased to 2^-32 and faster; (2^32 - 1) * 2^32 still fits 64 bits
    return ((mixed >> np.uint64(32)) * side) >> np.uint64(32)
