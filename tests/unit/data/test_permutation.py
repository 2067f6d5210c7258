from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data.permutation import Permutation

GOLDEN_10 = [7, 5, 8, 2, 4, 3, 6, 1, 0, 9]
GOLDEN_BIG = [766266855691, 647254046584, 208254044925]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 100, 997, 1024, 1025, 4096, 65_537, 100_003])
def test_is_a_bijection(size: int) -> None:
    image = Permutation(size, 3, "epoch", 0)(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 2**63), seed=st.integers(0, 2**62), data=st.data())
def test_inverse_undoes_it_for_any_size(size: int, seed: int, data: st.DataObject) -> None:
    permutation = Permutation(size, seed)
    index = np.asarray(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    image = permutation(index)
    assert int(image.min()) >= 0
    assert int(image.max()) < size
    assert np.array_equal(permutation.inverse(image), index)


def test_the_values_are_the_same_forever() -> None:
    """A resumed run draws the rows that the first one left: changing the function breaks every checkpoint."""
    assert Permutation(10, 0, "rows", "all", 0)(np.arange(10)).tolist() == GOLDEN_10
    assert Permutation(10**12, 7)(np.arange(3)).tolist() == GOLDEN_BIG


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_every_order_of_a_tiny_set_is_as_likely(size: int) -> None:
    draws = 6000
    seen = collections.Counter(tuple(Permutation(size, seed)(np.arange(size)).tolist()) for seed in range(draws))
    expected = draws / math.factorial(size)
    chi2 = sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    freedom = math.factorial(size) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations of a chi-square


def test_neighbours_are_scattered() -> None:
    """Positions of consecutive rows are uncorrelated, and each tenth of the set gets a tenth of a run of rows."""
    size = 1_000_003
    image = Permutation(size, 1)(np.arange(20_000))
    correlation = np.corrcoef(image[:-1], image[1:])[0, 1]
    assert abs(correlation) < 0.03
    share = np.bincount(image * 10 // size, minlength=10) / len(image)
    assert np.abs(share - 0.1).max() < 0.01


def test_keys_choose_unrelated_orders() -> None:
    index = np.arange(10_000)
    one, other = Permutation(10_000, 0, "rows", 0)(index), Permutation(10_000, 0, "rows", 1)(index)
    assert (one == other).sum() < 12  # one expected by chance


def test_refuses_what_is_outside() -> None:
    permutation = Permutation(10, 0)
    with pytest.raises(IndexError):
        permutation(np.asarray([10]))
    with pytest.raises(IndexError):
        permutation(np.asarray([-1]))
    with pytest.raises(ValueError, match="between 1 and"):
        Permutation(0)


def test_scalars_and_shapes() -> None:
    permutation = Permutation(100, 0)
    square = permutation(np.arange(100).reshape(10, 10))
    assert square.shape == (10, 10)
    assert permutation(42).shape == ()
    assert int(permutation(42)) == square[4, 2]


def test_a_row_goes_anywhere_just_above_the_sorted_sizes() -> None:
    draws = 5000
    images = np.stack([Permutation(1025, seed)(np.asarray([0, 1])) for seed in range(draws)])
    for column in images.T:
        counts = np.bincount(column * 25 // 1025, minlength=25)
        assert ((counts - draws / 25) ** 2 / (draws / 25)).sum() < 24 + 4 * math.sqrt(48)
    assert abs(np.corrcoef(images.T)[0, 1]) < 0.06
