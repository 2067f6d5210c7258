"""The sampling functions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.base.errors import ConfigError
from trainwright.inference.options import GenerationOptions, options_from_hf
from trainwright.inference.sampling import draw, filter_logits, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]])
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def test_filters_keep_what_they_say() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [0, 1]
    assert kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_p(LOGITS, 0.75 - 1e-4)) == [0, 1]
    assert kept(keep_top_p(LOGITS, 0.76)) == [0, 1, 2]
    assert kept(keep_top_p(LOGITS, 1e-6)) == [0], "the likeliest always stays"
    assert kept(keep_min_p(LOGITS, 0.25)) == [0, 1, 2]
    assert kept(keep_min_p(LOGITS, 1.0)) == [0]


def test_penalty_lowers_seen_tokens_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_order_of_filters_matters_and_is_temperature_first() -> None:
    """At temperature 2 the distribution is flatter, so top_p keeps more tokens than it would at 1."""
    options = GenerationOptions(temperature=2.0, top_p=0.7)
    flat = (LOGITS / 2).softmax(-1)
    expected = int((flat.sort(descending=True).values.cumsum(-1) < 0.7).sum()) + 1
    assert len(kept(filter_logits(LOGITS, options))) == expected > len(kept(keep_top_p(LOGITS, 0.7)))


def test_draw_follows_the_distribution() -> None:
    uniforms = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(LOGITS.expand(200_000, -1), uniforms), minlength=5) / 200_000
    standard_error = math.sqrt(0.25 / 200_000)
    torch.testing.assert_close(counts, PROBABILITIES[0], rtol=0, atol=5 * standard_error)


def test_draw_never_takes_a_removed_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    just_below_one = 1 - 2**-53
    assert draw(logits, torch.tensor([0.0, 0.5, just_below_one], dtype=torch.float64)).tolist() == [1, 3, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": -1},
        {"stop": "text"},
        {"stop": ("",)},
        {"overflow": "ignore"},
    ],
)
def test_bad_options_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        GenerationOptions(**changes)


def test_options_of_a_generation_config() -> None:
    assert options_from_hf({"do_sample": False, "temperature": 0.6}).temperature == 0.0
    sampled = options_from_hf({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]})
    assert sampled == GenerationOptions(temperature=0.6, top_k=50, top_p=0.9, eos_ids=(2, 3))
    assert options_from_hf({"eos_token_id": 7}) == GenerationOptions(eos_ids=(7,))
