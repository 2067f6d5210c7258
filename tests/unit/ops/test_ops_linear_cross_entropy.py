"""The chunked loss against torch's own over all logits: sums, gradients, options, dtypes, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.ops.linear_cross_entropy import (
    auto_chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0},
}


def problem(dtype: torch.dtype = torch.float32, tokens: int = 101, width: int = 24, words: int = 83) -> Any:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def sums_and_gradients(
    function: Any, hidden: Any, weight: Any, labels: Any, factor: float = 0.37, **options: Any
) -> Any:
    sums = function(hidden, weight, labels, **options)
    return sums, torch.autograd.grad(sums.loss_sum * factor, (hidden, weight))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 40, 101, 1000])
def test_equals_the_reference(options: str, chunk: int | None) -> None:
    expected, expected_grads = sums_and_gradients(linear_cross_entropy_reference, *problem(), **OPTIONS[options])
    got, grads = sums_and_gradients(linear_cross_entropy, *problem(), chunk_tokens=chunk, **OPTIONS[options])
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=2e-6, atol=1e-6)
    for left, right in zip(grads, expected_grads, strict=True):
        assert (left - right).norm() < 2e-6 * right.norm()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_finite_differences(options: str) -> None:
    hidden, weight, labels = problem(torch.float64, tokens=6, width=3, words=5)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, chunk_tokens=4, **OPTIONS[options]).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_equals_eager(options: str) -> None:
    torch._dynamo.reset()
    expected, expected_grads = sums_and_gradients(linear_cross_entropy, *problem(), chunk_tokens=64, **OPTIONS[options])
    got, grads = sums_and_gradients(
        linear_cross_entropy, *problem(), chunk_tokens=64, compiled=True, **OPTIONS[options]
    )
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-5, atol=1e-5)
    for left, right in zip(grads, expected_grads, strict=True):
        assert (left - right).norm() < 2e-6 * right.norm()


def test_bf16_under_autocast_stays_within_its_stated_bound() -> None:
    """Logits are rounded to bf16 (0.4 %): loss within 0.1 %, gradients within 1 % of their norm; sums stay fp32."""
    hidden, weight, labels = problem(tokens=512, width=64, words=500)
    with torch.no_grad():
        weight *= 0.2
    expected, expected_grads = sums_and_gradients(linear_cross_entropy_reference, hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=128)
    grads = torch.autograd.grad(got.loss_sum * 0.37, (hidden, weight))
    assert got.loss_sum.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    assert abs(got.loss_sum - expected.loss_sum) < 1e-3 * expected.loss_sum
    for left, right in zip(grads, expected_grads, strict=True):
        assert (left - right).norm() < 1e-2 * right.norm()


def test_a_confident_token_keeps_its_small_gradient_in_bf16() -> None:
    """p = 0.9991 rounds to 1 in bf16; 1 - p must not become 0."""
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).loss_sum.backward()
    exact = -7 * (1 - 1 / (1 + torch.exp(torch.tensor(-7.0))))
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float()[0, 0], exact, rtol=1e-2, atol=0)


def test_without_gradients_none_are_made() -> None:
    hidden, weight, labels = problem()
    with torch.no_grad():
        sums = linear_cross_entropy(hidden, weight, labels)
    assert not sums.loss_sum.requires_grad
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(sums.loss_sum, expected.loss_sum.detach())


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels = problem()
    frozen = weight.detach()
    sums = linear_cross_entropy(hidden, frozen, labels)
    (grad,) = torch.autograd.grad(sums.loss_sum, (hidden,))
    (expected,) = torch.autograd.grad(linear_cross_entropy_reference(hidden, frozen, labels).loss_sum, (hidden,))
    torch.testing.assert_close(grad, expected)


def test_nothing_to_learn_gives_zeros() -> None:
    hidden, weight, labels = problem()
    for chosen, rows in ((torch.full_like(labels, -100), hidden), (labels[:0], hidden[:0])):
        sums = linear_cross_entropy(rows, weight, chosen, z_loss=0.1)
        assert sums.loss_sum == 0
        assert sums.count == 0
        (grad,) = torch.autograd.grad(sums.loss_sum, (weight,))
        assert not grad.any()


def test_never_holds_all_logits() -> None:
    """Counts every tensor that is made: with chunks of 64 of 1024 tokens, none has more than 64 x V numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    hidden, weight, labels = problem(tokens=1024, width=8, words=2000)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=64).loss_sum.backward()
    assert seen.numbers == 64 * 2000


def test_chunks_are_equal_and_follow_the_budget() -> None:
    assert auto_chunk_tokens(4096, 8192, torch.bfloat16, "cpu") == 2048
    assert auto_chunk_tokens(4096, 32000, torch.bfloat16, "cpu") == 512
    assert auto_chunk_tokens(100, 8192, torch.bfloat16, "cpu") == 100
    assert auto_chunk_tokens(4096, 8_000_000, torch.float32, "cpu") == 64


def test_wrong_shapes_are_named() -> None:
    hidden, weight, labels = problem()
    with pytest.raises(ModelError, match="labels"):
        linear_cross_entropy(hidden, weight, labels[:-1])
