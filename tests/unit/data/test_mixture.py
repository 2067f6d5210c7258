from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError
from trainwright.data.mixture import MAX_PERIOD, Mixture, RowGroup, RowOrder


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_counts_stay_within_one_of_the_weights(weights: list[int]) -> None:
    mixture = Mixture([float(weight) for weight in weights])
    draws = np.arange(2 * mixture.period + 3)
    source, nth = mixture.locate(draws)
    shares = np.asarray(weights) / sum(weights)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(counts - shares * (draws[:, None] + 1)).max() < 1
    for number in range(len(weights)):  # the n-th draw of a source is its n-th: none skipped, none twice
        assert nth[source == number].tolist() == list(range(int(counts[-1, number])))


def test_any_draw_is_located_alone() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    together = mixture.locate(np.arange(1000))
    alone = [mixture.locate(np.asarray([draw])) for draw in (0, 7, 999)]
    for draw, (source, nth) in zip((0, 7, 999), alone, strict=True):
        assert (source[0], nth[0]) == (together[0][draw], together[1][draw])
    far = mixture.locate(np.asarray([10**15]))
    assert int(far[1][0]) == pytest.approx(10**15 * mixture.weights[int(far[0][0])], abs=1)


def test_decimal_weights_are_exact_and_awkward_ones_nearly() -> None:
    assert Mixture([0.7, 0.2, 0.1]).parts == [7, 2, 1]
    awkward = Mixture([math.pi, math.e, 0.001])
    assert awkward.period <= MAX_PERIOD
    total = math.pi + math.e + 0.001
    for real, wanted in zip(awkward.weights, (math.pi / total, math.e / total, 0.001 / total), strict=True):
        assert real == pytest.approx(wanted, abs=2 / MAX_PERIOD)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], [float("inf"), 1.0]])
def test_refuses_weights_that_are_no_shares(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive numbers"):
        Mixture(weights)


def test_a_source_repeats_only_after_all_its_rows() -> None:
    order = RowOrder([RowGroup("small", 0, 5, 0.5), RowGroup("big", 5, 1000, 0.5)], seed=3)
    rows, epochs = order.locate(np.arange(100))
    small = rows[rows < 5]
    assert len(small) == 50
    for epoch in range(10):
        assert sorted(small[epoch * 5 : epoch * 5 + 5].tolist()) == [0, 1, 2, 3, 4]
    assert len(np.unique(rows[rows >= 5])) == 50  # the big one has not repeated yet
    assert epochs[rows < 5].tolist() == [n // 5 for n in range(50)]
    assert len({tuple(small[e * 5 : e * 5 + 5].tolist()) for e in range(10)}) > 3  # a new order each epoch


def test_without_weights_all_sources_end_their_epoch_together() -> None:
    order = RowOrder([RowGroup("a", 0, 30), RowGroup("b", 30, 70)], seed=0)
    for epoch in range(3):
        rows = order(np.arange(epoch * 100, epoch * 100 + 100))
        assert sorted(rows.tolist()) == list(range(100))


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    groups = [RowGroup("all", 0, 1000)]
    draws = np.arange(2500)
    one = RowOrder(groups, seed=1)(draws)
    assert np.array_equal(one, RowOrder(groups, seed=1)(draws))
    assert np.array_equal(one[::-1], RowOrder(groups, seed=1)(draws[::-1]))
    assert not np.array_equal(one, RowOrder(groups, seed=2)(draws))


def test_refuses_a_dataset_without_rows() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        RowOrder([RowGroup("all", 0, 0)], seed=0)
