"""Rates over a window, without the steps that compile."""

from __future__ import annotations

import pytest

from trainwright.monitor import ThroughputMeter


def test_nothing_is_known_before_the_first_step() -> None:
    meter = ThroughputMeter(flops_per_step=1e6, peak_flops=1e9)
    assert meter.tokens_per_second is meter.mfu is meter.data_wait is meter.eta_seconds(10) is None


def test_compile_steps_do_not_count() -> None:
    meter = ThroughputMeter(skip=2)
    meter.step(tokens=100, seconds=60.0)
    assert meter.tokens_per_second == pytest.approx(100 / 60), "better than nothing while there is nothing better"
    meter.step(tokens=100, seconds=30.0)
    meter.step(tokens=100, seconds=1.0)
    meter.step(tokens=300, seconds=1.0)
    assert meter.tokens_per_second == pytest.approx(200)
    assert meter.eta_seconds(7) == pytest.approx(7.0)


def test_tokens_that_are_read_have_a_rate_of_their_own() -> None:
    meter = ThroughputMeter(skip=0)
    assert meter.inputs_per_second is None
    meter.step(tokens=8, inputs=240, seconds=1.0)  # eight texts of thirty tokens
    meter.step(tokens=8, inputs=360, seconds=2.0)
    assert meter.inputs_per_second == pytest.approx(200)
    assert meter.tokens_per_second == pytest.approx(16 / 3)


def test_the_window_forgets() -> None:
    meter = ThroughputMeter(window=3, skip=0)
    for seconds in (100.0, 1.0, 2.0, 3.0):
        meter.step(tokens=60, seconds=seconds)
    assert meter.tokens_per_second == pytest.approx(180 / 6)
    assert meter.seconds_per_step == pytest.approx(2.0)


def test_rate_weighs_tokens_and_time_not_steps() -> None:
    meter = ThroughputMeter(skip=0)
    meter.step(tokens=1000, seconds=1.0)
    meter.step(tokens=1000, seconds=9.0)
    assert meter.tokens_per_second == pytest.approx(200), "the mean of the two rates would say 556"


def test_mfu_is_against_the_measured_peak() -> None:
    meter = ThroughputMeter(flops_per_step=4096 * 2e8, peak_flops=1e12, skip=0)
    meter.step(tokens=4096, seconds=2.0)
    assert meter.mfu == pytest.approx(4096 / 2 * 2e8 / 1e12)
    assert ThroughputMeter(flops_per_step=2e8).mfu is None


def test_mfu_does_not_depend_on_what_is_counted_as_trained() -> None:
    few, many = (ThroughputMeter(flops_per_step=1e9, peak_flops=1e12, skip=0) for _ in range(2))
    few.step(tokens=10, seconds=1.0)
    many.step(tokens=4096, seconds=1.0)
    assert few.mfu == many.mfu == pytest.approx(1e-3)


def test_data_wait_is_a_share_of_time() -> None:
    meter = ThroughputMeter(skip=0)
    meter.step(tokens=1, seconds=1.0, waited=0.5)
    meter.step(tokens=1, seconds=3.0, waited=0.1)
    assert meter.data_wait == pytest.approx(0.15)


def test_no_time_left_is_zero_never_negative() -> None:
    meter = ThroughputMeter(skip=0)
    meter.step(tokens=1, seconds=1.0)
    assert meter.eta_seconds(0) == meter.eta_seconds(-3) == 0.0
