"""Every attention backend against the definition, values and gradients, for every kind of mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.ops.attention import attention, attention_reference, blocked, choose_backend
from trainwright.ops.attention.blocked import KEEP_WEIGHTS_UP_TO, blocked_attention

TRAINING_BACKENDS = ("blocked", "grouped", "sdpa")


def tensors(
    length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length * 131 + heads * 7 + kv_heads)

    def one(count: int) -> torch.Tensor:
        return torch.randn(batch, length, count, dim, generator=generator).to(dtype).requires_grad_()

    return one(heads), one(kv_heads), one(kv_heads)


def documents(length: int, batch: int = 2) -> torch.Tensor:
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.04
    return starts.cumsum(1).int()


def left_padding(length: int, pads: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :pads] = False
    return mask


def value_and_gradients(function: Any, q: Any, k: Any, v: Any, **options: Any) -> list[torch.Tensor]:
    out = function(q, k, v, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), weights)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


MASKS: dict[str, Any] = {
    "causal": lambda n: {},
    "full": lambda n: {"causal": False},
    "documents": lambda n: {"document_ids": documents(n)},
    "window": lambda n: {"window": 37},
    "window of one": lambda n: {"window": 1},
    "padding": lambda n: {"key_mask": left_padding(n, 21)},
    "all": lambda n: {"document_ids": documents(n), "window": 50, "key_mask": left_padding(n, 21)},
    "scale": lambda n: {"scale": 0.3},
}


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 150, 256])
def test_backends_equal_the_definition(backend: str, mask: str, length: int) -> None:
    q, k, v = tensors(length, kv_heads=2)
    options = MASKS[mask](length)
    expected = value_and_gradients(attention_reference, q, k, v, **options)
    got = value_and_gradients(attention, q, k, v, backend=backend, **options)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [300, KEEP_WEIGHTS_UP_TO + 30])
def test_blocked_in_both_memory_modes_and_all_groupings(kv_heads: int, length: int) -> None:
    q, k, v = tensors(length, kv_heads=kv_heads)
    options = {"document_ids": documents(length), "window": 200}
    expected = value_and_gradients(attention_reference, q, k, v, **options)
    got = value_and_gradients(attention, q, k, v, backend="blocked", **options)
    for left, right in zip(got, expected, strict=True):
        assert relative_error(left, right) < 1e-6


@pytest.mark.parametrize("length", [256, KEEP_WEIGHTS_UP_TO + 128])
def test_blocked_bf16_stays_within_its_stated_bound(length: int) -> None:
    """0.6 % of the norm: products are rounded to 8 bits of mantissa (0.4 %); torch's flash kernel is at 0.2-0.5 %."""
    q, k, v = tensors(length, batch=1, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = value_and_gradients(attention_reference, *exact)
    got = value_and_gradients(attention, q, k, v, backend="blocked")
    assert all(part.dtype == torch.bfloat16 for part in got)
    for left, right in zip(got, expected, strict=True):
        assert relative_error(left, right) < 6e-3


@pytest.mark.parametrize("keep", [True, False])
def test_blocked_gradients_by_finite_differences(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "KEEP_WEIGHTS_UP_TO", 512 if keep else 0)
    q, k, v = tensors(7, batch=1, heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])

    def run(*qkv: torch.Tensor) -> torch.Tensor:
        return blocked_attention(
            *qkv, document_ids=document_ids, window=3, scale=0.7, causal=True, key_mask=None, block=3
        )

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_packed_documents_equal_one_at_a_time() -> None:
    lengths = [70, 1, 129, 56]
    q, k, v = tensors(sum(lengths), batch=1)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int()
    for backend in TRAINING_BACKENDS:
        packed = attention(q, k, v, document_ids=ids, backend=backend)
        alone = [
            attention(*(x[:, start : start + n] for x in (q, k, v)), backend="reference")
            for start, n in zip([0, 70, 71, 200], lengths, strict=True)
        ]
        torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "grouped", "sdpa", "flex"])
@pytest.mark.parametrize("new", [1, 5])
def test_decoding_equals_the_end_of_the_whole(backend: str, new: int) -> None:
    q, k, v = (x.detach() for x in tensors(40, kv_heads=2))
    for options in ({}, {"window": 9}, {"key_mask": left_padding(40, 12)}):
        whole = attention_reference(q, k, v, **options)
        step = attention(q[:, -new:], k, v, backend=backend, **options)
        torch.testing.assert_close(step, whole[:, -new:], rtol=1e-5, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan() -> None:
    q, k, v = tensors(130)
    for backend in (*TRAINING_BACKENDS, "reference"):
        out, *grads = value_and_gradients(attention, q, k, v, backend=backend, key_mask=left_padding(130, 10))
        assert torch.equal(out[0, :10], torch.zeros_like(out[0, :10]))
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    "length", [160, pytest.param(KEEP_WEIGHTS_UP_TO + 40, marks=pytest.mark.slow)], ids=["kept", "recomputed"]
)
def test_compiled_blocked_equals_eager(length: int) -> None:
    q, k, v = tensors(length, batch=1, heads=2, kv_heads=1)
    ids = documents(length, 1)
    compiled = torch.compile(attention, dynamic=False)
    got = value_and_gradients(compiled, q, k, v, backend="blocked", document_ids=ids)
    expected = value_and_gradients(attention, q, k, v, backend="blocked", document_ids=ids)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=5e-6)


def test_long_sequences_do_not_keep_their_weights_when_compiled() -> None:
    """What forward leaves for backward is q, k, v, the output and row statistics; besides masks, nothing with T x T."""
    saved: list[torch.Tensor] = []
    q, k, v = tensors(KEEP_WEIGHTS_UP_TO + 128, batch=1, heads=2, kv_heads=1)
    compiled = torch.compile(attention, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compiled(q, k, v, backend="blocked")
    assert saved
    assert max(tensor.numel() for tensor in saved if tensor.dtype != torch.bool) == q.numel()


def test_autocast_rounds_fp32_inputs() -> None:
    q, k, v = tensors(140)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, attention_reference(q, k, v)) < 8e-3


def test_the_choice_follows_its_rule_and_says_why() -> None:
    def name(device: str, queries: int, keys: int, **options: Any) -> str:
        return choose_backend(device, query_length=queries, key_length=keys, **options).name

    assert name("cpu", 512, 512) == "blocked"
    assert name("cpu", 512, 512, documents=True, window=64) == "blocked"
    assert name("cpu", 64, 64) == "grouped"
    assert name("cpu", 512, 512, causal=False) == "grouped"
    assert name("cpu", 1, 900) == name("mps", 1, 900) == "grouped"
    assert name("cuda", 1024, 1024) == "sdpa"
    assert name("cuda", 1024, 1024, documents=True) == name("cuda", 1024, 1024, window=128) == "flex"
    assert name("cuda", 1, 1024, window=128) == "sdpa"
    assert "documents" in choose_backend("cpu", query_length=512, key_length=512, documents=True).reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "magic"}, "unknown attention backend"),
        ({"window": 0}, "window"),
        ({"window": 3, "causal": False}, "window"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask"),
        ({"document_ids": torch.zeros(2, 3, dtype=torch.int32)}, "document_ids"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], words: str) -> None:
    q, k, v = tensors(12)
    with pytest.raises(ModelError, match=words):
        attention(q, k, v, **change)


def test_wrong_shapes_are_named() -> None:
    q, k, v = tensors(12)
    with pytest.raises(ModelError, match="share 3"):
        attention(q, *(x[:, :, :3] for x in (k, v)))
    with pytest.raises(ModelError, match="only 5 keys"):
        attention(q, *(x[:, :5] for x in (k, v)))
    with pytest.raises(ModelError, match="blocked"):
        attention(q[:, :5], k, v, backend="blocked")
