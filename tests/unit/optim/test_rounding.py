"""Stochastic rounding: the generator against its published outputs, the mean, and bits that depend on the place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.comm.boxes import narrow
from trainwright.optim.rounding import random_words, round_box, round_stochastically

MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The algorithm as its author publishes it, https://prng.di.unimi.it/splitmix64.c, in Python's exact integers."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_published_outputs() -> None:
    # For seed 1234567, from the Rosetta Code task "Pseudo-random numbers/Splitmix64".
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(word) & MASK for word in random_words(1234567, 0, 5)] == expected


@settings(deadline=None, max_examples=40)
@given(key=st.integers(0, 2**63 - 1), first=st.integers(0, 2**40), count=st.integers(1, 40))
def test_words_equal_splitmix64_anywhere_in_the_stream(key: int, first: int, count: int) -> None:
    expected = splitmix64((key + first * 0x9E3779B97F4A7C15) & MASK, count)
    assert [int(word) & MASK for word in random_words(key, first, count)] == expected


def rounded(values: torch.Tensor, *, key: int = 7, first: int = 0) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values, target, key=key, first=first)
    return target


def test_numbers_that_fit_stay_and_others_go_to_a_neighbour() -> None:
    torch.manual_seed(0)
    fitting = torch.randn(5000).to(torch.bfloat16)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40]).to(torch.bfloat16)
    for exact in (fitting, special):
        found = rounded(exact.float())
        assert torch.equal(found.view(torch.int16), exact.view(torch.int16))
    values = torch.randn(100_000)
    found = rounded(values).float()
    spacing = 2.0 ** (torch.floor(torch.log2(values.abs())) - 7)
    assert bool(((found - values).abs() < spacing).all())
    assert rounded(torch.tensor([math.nan])).isnan().all()


def test_the_mean_is_right() -> None:
    for value in (1.0 + 1 / 512, -(1.0 + 1 / 1024), 3.1e-3):
        found = rounded(torch.full((400_000,), value)).double()
        spread = float(found.std()) / math.sqrt(found.numel())
        assert abs(float(found.mean()) - value) < 4 * spread


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), cut=st.floats(0, 1), first=st.integers(0, 2**33))
def test_a_part_rounds_as_in_the_whole(size: int, cut: float, first: int) -> None:
    values = torch.sin(torch.arange(size) * 0.37)
    whole = rounded(values, first=first)
    at = int(cut * size)
    parts = torch.cat([rounded(values[:at], first=first), rounded(values[at:], first=first + at)])
    assert torch.equal(whole, parts)


def test_pieces_of_work_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainwright.optim import rounding

    values = torch.sin(torch.arange(100_003) * 0.1)
    expected = rounded(values, first=5)
    monkeypatch.setitem(rounding._PIECE_WORDS, "cpu", 129)
    assert torch.equal(rounded(values, first=5), expected)


def test_other_keys_give_other_bits_and_strides_do_not_matter() -> None:
    values = torch.full((64, 64), 1.003)
    assert not torch.equal(rounded(values, key=1), rounded(values, key=2))
    target = torch.empty(64, 64, dtype=torch.bfloat16).t()
    round_stochastically(values, target, key=1)
    assert torch.equal(target, rounded(values, key=1))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="from fp32 to bf16"):
        round_stochastically(torch.zeros(3), torch.zeros(3, dtype=torch.float16), key=0)


@pytest.mark.parametrize(
    ("shape", "offset", "box"),
    [
        ((8, 12), (2, 0), (3, 12)),  # whole rows
        ((8, 12), (2, 4), (3, 8)),  # runs of whole words
        ((8, 12), (2, 3), (3, 7)),
        ((7, 13), (0, 6), (7, 7)),
        ((3, 8, 20), (1, 4, 0), (2, 4, 20)),
        ((3, 8, 20), (1, 4, 8), (2, 4, 12)),
        ((3, 5, 7), (0, 1, 2), (3, 3, 4)),
        ((9,), (4,), (5,)),
        ((4, 1, 6), (1, 0, 0), (2, 1, 6)),
        ((600, 700), (0, 350), (600, 350)),  # several pieces
    ],
)
def test_a_box_rounds_as_the_whole_does(shape: tuple[int, ...], offset: tuple[int, ...], box: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    whole = torch.empty(shape, dtype=torch.bfloat16)
    round_stochastically(values, whole, key=77)
    target = torch.empty(box, dtype=torch.bfloat16)
    round_box(narrow(values, offset, box), target, key=77, offset=offset, whole=shape)
    assert torch.equal(target, narrow(whole, offset, box))
    strided = torch.empty((2, *box), dtype=torch.bfloat16)[1:].transpose(0, 1)[:, 0]
    round_box(narrow(values, offset, box), strided, key=77, offset=offset, whole=shape)
    assert torch.equal(strided, target)
