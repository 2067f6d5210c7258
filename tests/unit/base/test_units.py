"""Durations, counts and sizes: what is read, what is refused, and that the printed form reads back the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError
from trainwright.base.units import Bytes, Count, Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("100 steps", 100, "steps"),
        ("1 step", 1, "steps"),
        ("2M tokens", 2_000_000, "tokens"),
        ("1.5B tokens", 1_500_000_000, "tokens"),
        ("2 epochs", 2, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        ("10 min", 600, "seconds"),
        ("10m", 600, "seconds"),
        ("1h30m", 5400, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("2 days", 172_800, "seconds"),
        ("0.25 s", 0.25, "seconds"),
    ],
)
def test_reads_durations(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "wrong",
    ["", "100", 100, "steps", "2M", "-3 steps", "1.5 steps", "0 steps", "30m1h", "1h1h", "5 parsecs", None, True],
)
def test_refuses_what_is_no_duration_and_says_what_was_seen(wrong: object) -> None:
    with pytest.raises(ConfigError) as error:
        Duration.parse(wrong)
    assert repr(wrong) in str(error.value)
    assert "100 steps" in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("20M", 20_000_000), (512, 512), ("1.5B", 1_500_000_000), ("8k", 8000), (1e6, 10**6), ("1e3", 1000)],
)
def test_reads_counts(text: object, value: int) -> None:
    assert Count.parse(text) == value


@pytest.mark.parametrize("wrong", ["", "20 M tokens", "1.5", -1, 0.5, "1e999", True, None, "20m", float("inf"), [3]])
def test_refuses_what_is_no_count(wrong: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        Count.parse(wrong)


@pytest.mark.parametrize(
    ("text", "value"), [("4 GiB", 4 * 2**30), ("500 MB", 500_000_000), (7, 7), ("1.5 KiB", 1536), ("3b", 3)]
)
def test_reads_bytes(text: object, value: int) -> None:
    assert Bytes.parse(text) == value


@pytest.mark.parametrize("wrong", ["4 Gigs", "0.3 B", -1, True, None, 1.5])
def test_refuses_what_is_no_size(wrong: object) -> None:
    with pytest.raises(ConfigError, match="4 GiB"):
        Bytes.parse(wrong)


def test_the_printed_form_is_the_short_one_where_it_is_exact() -> None:
    assert str(Count(20_000_000)) == "20M"
    assert str(Count(8192)) == "8192"
    assert f"{Count(20_000_000):d}" == "20000000"
    assert str(Bytes(4 * 2**30)) == "4 GiB"
    assert str(Bytes(500_000_000)) == "500 MB"
    assert str(Bytes(1_000_000_007)) == "1000000007 B"
    assert [str(Duration(s, "seconds")) for s in (30, 600, 3600, 5400, 90)] == [
        "30 s",
        "10 min",
        "1 h",
        "1h30m",
        "1m30s",
    ]


@given(st.integers(0, 2**62))
def test_counts_and_bytes_round_trip(value: int) -> None:
    assert Count.parse(str(Count(value))) == value
    assert Bytes.parse(str(Bytes(value))) == value


@given(
    st.one_of(
        st.tuples(st.integers(1, 2**60), st.sampled_from(["steps", "tokens", "epochs", "seconds"])),
        st.tuples(st.floats(1e-6, 1e9), st.sampled_from(["epochs", "seconds"])),
    )
)
def test_durations_round_trip(pair: tuple[float, str]) -> None:
    duration = Duration(*pair)
    assert Duration.parse(str(duration)) == duration


def test_a_duration_of_nothing_cannot_be_made() -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            Duration(value, "seconds")
    with pytest.raises(ConfigError):
        Duration(1.5, "steps")
