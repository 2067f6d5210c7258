"""A keyed permutation of [0, n) in O(1) memory: the order of the rows of an epoch, computed instead of stored.

A Feistel network over pairs (left, right) of numbers below a = ceil(sqrt(n)) permutes [0, a*a); an image that falls
outside [0, n) is permuted again until it falls inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). As a*a < n + 2*sqrt(n) + 1, nearly every value takes one walk. Every step is a bijection, so the
whole is one; nothing is stored, so row 10^12 of epoch 7 costs what row 0 of epoch 0 costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainwright.base.seeds import derive_seed

__all__ = ["Permutation"]

# Four rounds make a Feistel network indistinguishable from random in theory (Luby and Rackoff 1988) for big domains;
# eight leave margin.
ROUNDS = 8
# On tiny domains the network is structured whatever the rounds (n = 5: chi^2/df 5.4 over all 120 orders), so up to this
# size the numbers are sorted by a keyed hash instead: exactly uniform, and 8 KB at most.
SORTED_SIZE = 1024
_MAX_SIZE = 2**63

_Step = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]


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
        self._side = np.uint64(root)
        self._keys = [np.uint64(derive_seed("permutation", round_, *key)) for round_ in range(ROUNDS)]
        self._table: NDArray[np.int64] | None = None
        if size <= SORTED_SIZE:
            numbers = np.arange(size, dtype=np.uint64)
            self._table = np.argsort(_mix(numbers + self._keys[1], self._keys[0]), kind="stable")

    def __len__(self) -> int:
        return self.size

    def __call__(self, index: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """Where each index goes: int64 of the same shape. Raises IndexError outside [0, size)."""
        given, flat = self._checked(index)
        values = self._walk(flat, self._forward) if self._table is None else self._table[flat]
        return values.reshape(given.shape)

    def inverse(self, image: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """Which index goes to each image: `inverse(self(i)) == i`."""
        given, flat = self._checked(image)
        values = self._walk(flat, self._backward) if self._table is None else np.argsort(self._table)[flat]
        return values.reshape(given.shape)

    def _checked(self, index: NDArray[np.integer] | int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        given = np.asarray(index)
        flat = np.atleast_1d(given).ravel().astype(np.int64)
        if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= self.size):
            raise IndexError(f"index outside [0, {self.size}): {int(flat.min())} to {int(flat.max())}")
        return given, flat

    def _walk(self, index: NDArray[np.int64], step: _Step) -> NDArray[np.int64]:
        values = step(index.astype(np.uint64))
        limit = np.uint64(self.size)
        outside = np.flatnonzero(values >= limit)
        while outside.size:
            values[outside] = step(values[outside])
            outside = outside[values[outside] >= limit]
        return values.astype(np.int64)

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
    """A pseudo-random number below `side` (at most 2^32) for each value."""
    # multiply-shift instead of a modulo: unbiased to 2^-32 and faster; (2^32 - 1) * 2^32 still fits 64 bits
    return ((_mix(value, key) >> np.uint64(32)) * side) >> np.uint64(32)


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 well-mixed bits of each value: the finaliser of splitmix64 (Steele, Lea and Flood 2014), keyed twice."""
    mixed = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27)) ^ key) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
