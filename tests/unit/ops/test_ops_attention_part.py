"""Attention by parts of the keys, joined: values and gradients against the definition, for pieces in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.ops.attention import attention_part, attention_part_backward, attention_reference, flash, merge_parts
from trainwright.ops.attention.pairs import block_pairs, rectangles


def tensors(length: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length * 131 + heads * 7 + kv_heads)
    return [
        torch.randn(2, length, count, 16, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def documents(length: int) -> Tensor:
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.02
    return starts.cumsum(1).int()


def zigzag(length: int, degree: int, rank: int) -> tuple[range, ...]:
    size = length // (2 * degree)
    return tuple(range(n * size, (n + 1) * size) for n in (rank, 2 * degree - 1 - rank))


def take(x: Tensor, runs: tuple[range, ...]) -> Tensor:
    return torch.cat([x[:, run.start : run.stop] for run in runs], 1)


def put(whole: Tensor, runs: tuple[range, ...], part: Tensor) -> None:
    index = torch.tensor(list(itertools.chain(*runs)))
    whole.index_add_(1, index, part.to(whole.dtype))


def by_parts(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, degree: int, **options: Any) -> list[Tensor]:
    """Output and gradients, every rank of a ring played one after another."""
    length = q.shape[1]
    ids = options.pop("document_ids", None)
    results = [torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v)]
    orders = [zigzag(length, degree, rank) for rank in range(degree)]
    for mine in orders:
        rows, row_grad = take(q, mine), take(grad, mine)
        out = torch.zeros(rows.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = torch.full((q.shape[0], q.shape[2], rows.shape[1]), -torch.inf, dtype=out.dtype)
        hops = []
        for theirs in orders:
            more = {"q_positions": mine, "k_positions": theirs, **options}
            if ids is not None:
                more.update(q_documents=take(ids, mine), k_documents=take(ids, theirs))
            hops.append((theirs, take(k, theirs), take(v, theirs), more))
        for _, keys, values, more in hops:
            out, lse = merge_parts(out, lse, *attention_part(rows, keys, values, **more))
        put(results[0], mine, out)
        for theirs, keys, values, more in hops:
            shares = attention_part_backward(row_grad, rows, keys, values, out, lse, **more)
            for whole, runs, share in zip(results[1:], (mine, theirs, theirs), shares, strict=True):
                put(whole, runs, share)
    return results


def expected(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative error; of gradients that are all zero (a window of one), that of numbers around 1."""
    return max(
        float((a.double() - b).norm() / b.norm().clamp_min(b.numel() ** 0.5))
        for a, b in zip(found, wanted, strict=True)
    )


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 37},
    "window of one": {"window": 1},
    "wide window": {"window": 300},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_parts_make_the_whole(mask: str, degree: int) -> None:
    for length, kv_heads in ((48, 4), (1200, 1)):
        inputs = tensors(length, kv_heads=kv_heads)
        assert worst(by_parts(*inputs, degree, **MASKS[mask]), expected(*inputs, **MASKS[mask])) < 1e-6


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("degree", [1, 2])
def test_documents(window: int | None, degree: int) -> None:
    for length in (64, 1160):
        inputs, ids = tensors(length), documents(length)
        options = {"window": window, "document_ids": ids}
        assert worst(by_parts(*inputs, degree, **options), expected(*inputs, **options)) < 1e-6


def test_documents_in_any_order_are_told_apart() -> None:
    inputs = tensors(1160)
    ids = torch.randint(0, 3, (2, 1160), generator=torch.Generator().manual_seed(1))
    assert worst(by_parts(*inputs, 2, document_ids=ids), expected(*inputs, document_ids=ids)) < 1e-6


def test_precisions() -> None:
    double = tensors(96, dtype=torch.float64)
    assert worst(by_parts(*double, 2), expected(*double)) < 1e-12
    half = tensors(640, dtype=torch.bfloat16)
    assert worst(by_parts(*half, 2), expected(*half)) < 6e-3, "each product rounds to bf16, sums do not"


def test_compiled_blocks_compute_the_same() -> None:
    inputs, ids = tensors(640), documents(640)
    for options in ({}, {"window": 100}, {"document_ids": ids}):
        assert worst(by_parts(*inputs, 2, compiled=True, **options), expected(*inputs, **options)) < 1e-6


def test_blocks_that_hold_nothing_are_left_out() -> None:
    whole = (range(4096),)
    causal = rectangles(whole, whole, None, 256, 512)
    assert len(causal) == sum(1 + (n * 256 + 255) // 512 for n in range(16))
    assert len(rectangles(whole, whole, 256, 256, 512)) < len(causal) / 2
    ids = (torch.arange(4096) // 512)[None]
    rows = block_pairs(causal, ids, ids)
    assert [len(pairs) for pairs in rows.values()] == [1] * 16, "one document in each block of keys"
    assert not any(pair.by_document for pairs in rows.values() for pair in pairs)


def test_every_rank_of_a_zigzag_ring_has_the_same_work() -> None:
    def work(mine: tuple[range, ...], theirs: tuple[range, ...]) -> float:
        areas = rectangles(mine, theirs, None)
        return sum((a.q1 - a.q0) * (a.k1 - a.k0) * (1.0 if a.free else 0.5) for a in areas)

    orders = [zigzag(4096, 4, rank) for rank in range(4)]
    for hop in range(4):
        assert len({work(orders[rank], orders[(rank - hop) % 4]) for rank in range(4)}) == 1, f"hop {hop}"


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = tensors(16)
    with pytest.raises(ModelError, match="positions"):
        attention_part(q, k, v, q_positions=[range(15)], k_positions=[range(16)])
    with pytest.raises(ModelError, match="attention_part got"):
        attention_part(q[:, :, :3], k, v, q_positions=[range(16)], k_positions=[range(16)])


def test_tensors_without_contents_give_shapes() -> None:
    q, k, v, grad = (x.to("meta") for x in tensors(64))
    runs = {"q_positions": [range(64)], "k_positions": [range(64)]}
    out, lse = attention_part(q, k, v, **runs)
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 64))
    assert [x.shape for x in attention_part_backward(grad, q, k, v, out, lse, **runs)] == [q.shape, k.shape, v.shape]


def kernel_scores(q: Tensor, k: Tensor, causal: bool, left: int, scale: float) -> Tensor:
    """Scores [B, H, T, S] under the rule that FlashAttention documents: the last query stands beside the last key."""
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(groups, 2)) * scale
    place = torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])
    allowed = torch.ones_like(place, dtype=torch.bool)
    if causal:
        allowed &= place >= 0
    if left >= 0:
        allowed &= place <= left
    return scores.masked_fill(~allowed, -torch.inf)


def play_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = kernel_scores(q, k, causal, left, scale)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    return out.float(), scores.logsumexp(-1)


def play_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, left: int, scale: float
) -> tuple[Tensor, ...]:
    assert all(x.is_contiguous() for x in (grad, out, lse))
    groups = q.shape[2] // k.shape[2]
    weights = (kernel_scores(q, k, causal, left, scale) - lse[..., None]).exp()
    delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores = weights * (torch.einsum("bthd,bshd->bhts", grad, v.repeat_interleave(groups, 2)) - delta) * scale
    grad_q = torch.einsum("bhts,bshd->bthd", grad_scores, k.repeat_interleave(groups, 2))
    grad_k = torch.einsum("bhts,bthd->bshd", grad_scores, q).unflatten(2, (-1, groups)).sum(3)
    return grad_q, grad_k, torch.einsum("bhts,bthd->bshd", weights, grad).unflatten(2, (-1, groups)).sum(3)


@pytest.mark.parametrize("window", [None, 1, 5, 30, 70, 200])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_what_the_flash_kernels_are_asked_for(monkeypatch: Any, window: int | None, degree: int) -> None:
    """The kernels run on GPUs only; here their documented rule is played in plain torch, and all around it is real."""
    monkeypatch.setattr(flash, "is_usable", lambda q, areas: all(a.free or flash._is_square(a) for a in areas))
    monkeypatch.setattr(flash, "_forward_kernel", play_forward)
    monkeypatch.setattr(flash, "_backward_kernel", play_backward)
    inputs = tensors(240)
    assert worst(by_parts(*inputs, degree, window=window), expected(*inputs, window=window)) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernels need a GPU")
@pytest.mark.parametrize("window", [None, 300])
def test_the_flash_kernels_themselves(window: int | None) -> None:
    inputs = [x.cuda() for x in tensors(2048, dtype=torch.bfloat16)]
    runs = (range(2048),)
    positions = {"q_positions": runs, "k_positions": runs, "window": window}
    out, lse = attention_part(*inputs[:3], **positions)
    grads = attention_part_backward(inputs[3], *inputs[:3], out, lse, **positions)
    assert worst([out, *grads], expected(*inputs, window=window)) < 1e-2
