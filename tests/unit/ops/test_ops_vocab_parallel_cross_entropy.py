"""The loss over a divided vocabulary equals the loss over a whole one; its processes are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.ops.linear_cross_entropy import LossSums, linear_cross_entropy
from trainwright.ops.vocab_parallel_cross_entropy import VocabularyPart, vocab_parallel_cross_entropy


class Meeting:
    """Hands each of `parts` threads what all of them brought."""

    def __init__(self, parts: int) -> None:
        self.barrier = threading.Barrier(parts, timeout=20)
        self.brought: list[Tensor] = [torch.empty(0)] * parts
        self.most = 0

    def gather(self, number: int) -> Callable[[Tensor], Tensor]:
        def call(tensor: Tensor) -> Tensor:
            self.brought[number] = tensor
            self.most = max(self.most, tensor.numel())
            self.barrier.wait()
            stacked = torch.stack(self.brought)
            self.barrier.wait()
            return stacked

        return call


def on_parts(
    hidden: Tensor, weight: Tensor, labels: Tensor, cuts: list[int], **options: Any
) -> tuple[list[LossSums], Tensor, Tensor, Meeting]:
    """The sums of each part, the sum of the gradients of hidden, the joined gradients of the parts of the head."""
    meeting = Meeting(len(cuts) - 1)
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            mine = hidden.detach().clone().requires_grad_()
            rows = weight[cuts[number] : cuts[number + 1]].detach().clone().requires_grad_()
            part = VocabularyPart(cuts[number], weight.shape[0], len(cuts) - 1, meeting.gather(number))
            sums = vocab_parallel_cross_entropy(mine, rows, labels, part, **options)
            (3 * sums.loss_sum).backward()
            results[number] = sums, mine.grad, rows.grad
        except BaseException as error:
            results[number] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cuts) - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    ordered = [results[number] for number in range(len(threads))]
    hidden_grad = torch.stack([result[1] for result in ordered]).sum(0)
    return [result[0] for result in ordered], hidden_grad, torch.cat([result[2] for result in ordered]), meeting


@pytest.mark.parametrize("cuts", [[0, 37], [0, 19, 37], [0, 10, 20, 30, 37]])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2, "z_loss": 1e-2}, {"softcap": 2.0, "z_loss": 1e-3, "label_smoothing": 0.1}],
)
def test_equals_the_whole(cuts: list[int], options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 37, (50,), generator=generator)
    labels[::7] = -100
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = linear_cross_entropy(whole_hidden, whole_weight, labels, **options)
    (3 * expected.loss_sum).backward()
    sums, hidden_grad, weight_grad, meeting = on_parts(hidden, weight, labels, cuts, chunk_tokens=16, **options)
    for part in sums:
        for ours, theirs in zip(part, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden_grad, whole_hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight_grad, whole_weight.grad, rtol=1e-10, atol=1e-12)
    assert meeting.most == 4 * 16, "four numbers a token travel"


def test_bf16_products_and_huge_logits() -> None:
    """Confident tokens keep their small gradients, and logits of 300 do not overflow."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(24, 16, generator=generator)
    weight = 40 * torch.randn(30, 16, generator=generator)
    labels = (hidden @ weight.t()).argmax(-1)
    whole = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear_cross_entropy(whole, weight, labels)
    (3 * expected.loss_sum).backward()
    # Autocast belongs to a thread: the parts get what it would give them.
    sums, hidden_grad, _, _ = on_parts(hidden.bfloat16(), weight.bfloat16(), labels, [0, 15, 30])
    assert expected.loss_sum.item() < 5
    assert sums[0].loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-3, abs=1e-3)
    assert sums[0].correct == sums[1].correct == expected.correct
    assert whole.grad is not None
    torch.testing.assert_close(hidden_grad.float(), whole.grad, rtol=0.05, atol=0.05 * whole.grad.abs().max().item())


def test_shapes_and_parts_are_checked() -> None:
    part = VocabularyPart(4, 10, 2, lambda tensor: tensor[None])
    with pytest.raises(ModelError, match="labels"):
        vocab_parallel_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, dtype=torch.int64), part)
    with pytest.raises(ModelError, match="words 4 to 11"):
        vocab_parallel_cross_entropy(torch.ones(3, 4), torch.ones(7, 4), torch.ones(3, dtype=torch.int64), part)


def test_compiled_statistics_agree() -> None:
    hidden, weight = torch.randn(64, 8), torch.randn(20, 8)
    labels = torch.randint(0, 20, (64,))
    part = VocabularyPart(0, 20, 1, lambda tensor: tensor[None])
    plain = vocab_parallel_cross_entropy(hidden, weight, labels, part, label_smoothing=0.1)
    fused = vocab_parallel_cross_entropy(hidden, weight, labels, part, label_smoothing=0.1, compiled=True)
    assert fused.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-6)
