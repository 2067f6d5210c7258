"""Numbers and words for people, and columns that stay straight when text is wide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.text import (
    align_columns,
    did_you_mean,
    display_width,
    human_bytes,
    human_count,
    human_duration,
    nearest,
    pad_to_width,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (41234, "41.2k"),
        (999_950, "1M"),
        (1.5e9, "1.5B"),
        (-2000, "-2k"),
        (3.14159, "3.14"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1288490188, "1.2 GiB"), (5 * 2**40, "5 TiB")]
)
def test_bytes(value: float, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0042, "4.2ms"),
        (1, "1s"),
        (12.34, "12.3s"),
        (59.97, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (180_000, "2d02h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@given(st.floats(0, 1e15))
def test_a_count_is_within_half_a_unit_of_its_third_digit(value: float) -> None:
    text = human_count(value)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    read = float(text.rstrip("kMBT")) * scale
    assert abs(read - value) <= max(0.0051 * value, 0.0051)


def test_the_nearest_name() -> None:
    assert nearest("sequence_lenght", ["sequence_length", "seed"]) == "sequence_length"
    assert nearest("vocab", ["vocab_size", "path"]) == "vocab_size"
    assert nearest("zzz", ["vocab_size", "path"]) is None
    assert nearest("LR", ["lr"]) == "lr"
    assert did_you_mean("stepz", ["steps"]) == " Did you mean 'steps'?"
    assert did_you_mean("q", ["steps"]) == ""


def test_chinese_takes_two_cells_and_columns_stay_straight() -> None:
    assert display_width("数据 ok") == 7
    assert display_width("e\u0301") == 1
    assert pad_to_width("数据", 6) == "数据  "
    assert pad_to_width("数", 4, right=True) == "  数"
    lines = align_columns([("数据", "x"), ("loss", "yy"), ("a", "zzz")], right=(1,))
    assert lines == ["数据    x", "loss   yy", "a     zzz"]
    assert len({display_width(line) for line in lines}) == 1
    assert align_columns([]) == []


def test_the_width_is_that_of_the_terminal_library() -> None:
    from rich.cells import cell_len

    for text in ("plain", "中文字符", "ｆｕｌｌ", "Ａ１。", "한국어", "naïve", "ひらがな"):
        assert display_width(text) == cell_len(text)
