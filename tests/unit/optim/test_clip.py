"""Norm, scaling and clipping against torch's own and against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainwright.optim import OptimizerOptions, build_optimizer, clip_factor, clip_gradients, gradient_norm


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((7, 5), (3,), (), (2, 2, 2))]
    for p in made[:-1]:
        p.grad = torch.randn(p.shape).to(dtype)
    return made  # the last has no gradient


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    max_norm=st.one_of(st.none(), st.floats(0.01, 100)),
    scale=st.floats(1e-4, 10),
)
def test_equals_scaling_then_torchs_clipping(seed: int, max_norm: float | None, scale: float) -> None:
    mine, theirs = parameters(seed), parameters(seed)
    norm = clip_gradients(mine, max_norm, scale=scale)
    for p in theirs:
        if p.grad is not None:
            p.grad.mul_(scale)
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-7)
    for a, b in zip(mine, theirs, strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=1e-7)


def test_without_clipping_and_scaling_gradients_keep_their_bits() -> None:
    made = parameters()
    before = [p.grad.clone() for p in made if p.grad is not None]
    clip_gradients(made, None)
    clip_gradients(made, 1e9)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, made, strict=False) if p.grad is not None)


def test_no_gradients_at_all() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(3))], 1.0).item() == 0.0
    assert gradient_norm([]).item() == 0.0


def test_half_precision_gradients_have_an_fp32_norm() -> None:
    weight = nn.Parameter(torch.zeros(1 << 16, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1 / 256)
    norm = clip_gradients([weight], 0.5)
    # 65536 equal numbers: bf16 sums stall long before; the norm is exactly 256 / 256.
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(1.0, rel=1e-5)
    assert weight.grad[0].item() == pytest.approx(0.5 / 256, rel=1e-2)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_gradients_show_in_the_norm(poison: float) -> None:
    made = parameters()
    assert made[1].grad is not None
    made[1].grad[0] = poison
    assert not torch.isfinite(clip_gradients(made, 1.0, scale=0.1))


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_folded_into_the_step_it_is_the_same_update(max_norm: float | None) -> None:
    def stepped(fold: bool) -> list[torch.Tensor]:
        made = parameters()[:-1]
        optimizer = build_optimizer([(str(i), p) for i, p in enumerate(made)], OptimizerOptions(lr=0.1))
        scale = torch.tensor(1 / 4096)
        if fold:
            factor = clip_factor(gradient_norm(made), max_norm, scale=scale)
            optimizer.step(gradient_factor=factor)
        else:
            clip_gradients(made, max_norm, scale=scale)
            optimizer.step()
        return [p.detach() for p in made]

    for a, b in zip(stepped(True), stepped(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
