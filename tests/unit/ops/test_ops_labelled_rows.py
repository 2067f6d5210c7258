"""What is not trained costs no logits, and changes neither loss nor gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.models import LlamaConfig, build_model
from trainwright.ops.labelled_rows import labelled_rows
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.testing import tiny_llama_config


def test_only_labelled_rows_are_taken_in_few_shapes() -> None:
    hidden = torch.arange(1600.0)[:, None]
    shapes = set()
    for seed in range(40):
        labels = torch.randint(9, (1600,))
        labels[torch.rand(1600, generator=torch.Generator().manual_seed(seed)) > 0.15] = -100
        some, chosen = labelled_rows(hidden, labels)
        assert torch.equal(some[chosen >= 0].flatten(), hidden[labels >= 0].flatten())
        shapes.add(len(chosen))
    assert shapes <= {200, 300, 400}
    none = torch.full((1600,), -100)
    assert len(labelled_rows(hidden, none)[1]) == 100
    assert labelled_rows(hidden, torch.zeros(1600))[0] is hidden
    assert labelled_rows(hidden.to("meta"), none.to("meta"))[0].shape == hidden.shape


def chats(rows: int = 3, length: int = 64, words: int = 64) -> torch.Tensor:
    """Labels of which 24 of 64 in a row are not trained, in two stretches."""
    labels = torch.randint(words, (rows, length), generator=torch.Generator().manual_seed(1))
    labels[:, :15] = labels[:, 40:49] = -100
    return labels


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smooth"])
def test_a_decoder_has_the_loss_and_gradients_of_all_logits(options: dict[str, float]) -> None:
    model = build_model(LlamaConfig(**tiny_llama_config()), seed=0).double()
    words = model.head_weight.shape[0]
    labels = chats(words=words).flatten()
    hidden = torch.randn(len(labels), model.head_weight.shape[1], dtype=torch.float64, requires_grad=True)
    sums = model.head_loss(hidden, labels, **options)
    logits = hidden @ model.head_weight.t()
    counted = labels != -100
    expected = (
        F.cross_entropy(logits, labels, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0))
        + options.get("z_loss", 0.0) * (logits.logsumexp(-1)[counted] ** 2).sum()
    )
    ours = torch.autograd.grad(sums.loss_sum, (hidden, model.head_weight))
    theirs = torch.autograd.grad(expected, (hidden, model.head_weight))
    assert int(sums.count) == int(counted.sum())
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-12, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)
    assert not ours[0][~counted].any()


def test_what_is_not_trained_costs_no_logits() -> None:
    class Rows(TorchDispatchMode):
        """Most rows of any tensor as wide as the vocabulary."""

        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == words:
                self.most = max(self.most, out.shape[0])
            return out

    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=131)), seed=0)
    words = model.head_weight.shape[0]
    labels = chats(words=words).flatten()
    hidden = torch.randn(len(labels), model.head_weight.shape[1], requires_grad=True)
    with Rows() as seen:
        model.head_loss(hidden, labels).loss_sum.backward()
    assert seen.most == 120  # 40 of 64 labels in each of 3 rows: ten sixteenths


def test_one_graph_serves_every_number_of_trained_tokens() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    weight = torch.randn(96, 16, requires_grad=True)
    for tokens in range(192, 128, -4):  # 16 shapes: twice as many as torch compiles before it gives up
        hidden = torch.randn(tokens, 16, requires_grad=True)
        labels = torch.randint(96, (tokens,))
        mine = linear_cross_entropy(hidden, weight, labels, compiled=True)
        other = linear_cross_entropy(hidden, weight, labels)
        torch.testing.assert_close(tuple(mine), tuple(other), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(mine.loss_sum, (hidden, weight)),
            torch.autograd.grad(other.loss_sum, (hidden, weight)),
            rtol=1e-4,
            atol=1e-5,
        )
    assert counters["stats"]["unique_graphs"] == 1
