"""Products by groups against their definition, and copies of tokens there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainwright.ops.grouped_matmul import GroupedKernel, grouped_matmul, grouped_matmul_reference
from trainwright.ops.token_permutation import (
    count_choices,
    gather_copies,
    reorder_rows,
    sort_by_expert,
    spread_tokens,
)

COUNTS = ([5, 0, 7, 1], [0, 0, 0, 13], [13, 0, 0, 0], [3, 4, 2, 4], [0, 0, 0, 0])


def inputs(counts: list[int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 16, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(device, dtype).requires_grad_()
    return x, weight, torch.tensor(counts, device=device)


def compare(counts: list[int], dtype: torch.dtype, device: str, tolerance: float) -> None:
    x, weight, sizes = inputs(counts, dtype, device)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = grouped_matmul(x, weight, sizes)
    expected = grouped_matmul_reference(exact_x, exact_weight, sizes)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (out * direction.to(dtype)).sum().backward()
    (expected * direction.to(dtype).double()).sum().backward()
    for found, wanted in ((out, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_product_and_gradients_are_those_of_the_definition(
    counts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    compare(counts, dtype, "cpu", tolerance)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_product_and_gradients_on_cuda(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    compare(counts, dtype, "cuda", tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_does_not_wait_for_the_device() -> None:
    x, weight, sizes = inputs([5, 0, 7, 1], torch.bfloat16, "cuda")
    grouped_matmul(x, weight, sizes).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_matmul(x, weight, sizes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("counts", COUNTS[:4])
def test_the_way_of_the_kernel_gives_the_same(counts: list[int]) -> None:
    """torch computes its grouped product on a CPU as well, slowly: that it is called rightly can be seen there."""
    padded = [8 * count for count in counts]
    x, weight, sizes = inputs(padded, torch.float32)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = GroupedKernel.apply(x, weight, sizes.cumsum(0, dtype=torch.int32))
    expected = grouped_matmul_reference(exact_x, exact_weight, sizes)
    out.sum().backward()  # a gradient without memory of its own
    expected.sum().backward()
    for found, wanted in ((out, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_autocast_and_mixed_types() -> None:
    x, weight, sizes = inputs([5, 0, 7, 1], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_matmul(x, weight, sizes)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert grouped_matmul(x.detach().bfloat16(), weight, sizes).dtype == torch.float32


def test_gradients_by_differences() -> None:
    x, weight, sizes = inputs([2, 0, 3], torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: grouped_matmul(a, b, sizes), (x, weight))


def test_shapes_on_the_meta_device() -> None:
    x = torch.empty(13, 16, device="meta", requires_grad=True)
    weight = torch.empty(4, 24, 16, device="meta", requires_grad=True)
    out = grouped_matmul(x, weight, torch.empty(4, dtype=torch.int64, device="meta"))
    out.sum().backward()
    assert out.shape == (13, 24)
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("drops", [False, True])
def test_copies_go_to_their_experts_and_come_back(drops: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(7)])
    kept = torch.rand(7, 2, generator=generator) > 0.4 if drops else None
    order = sort_by_expert(experts, 5, kept)
    sent = experts.flatten()[order.copies]
    assert sent.tolist() == sorted(sent.tolist())
    assert order.counts.tolist() == torch.bincount(sent, minlength=5).tolist()
    assert order.counts.sum() == (experts.numel() if kept is None else kept.sum())
    for expert in range(5):  # of one expert the earlier token first
        places = order.copies[sent == expert]
        assert places.tolist() == sorted(places.tolist())
    copies = spread_tokens(tokens, order)
    assert torch.equal(copies, tokens[order.copies // 2])
    back = gather_copies(copies, order)
    expected = tokens[:, None].expand(-1, 2, -1)
    if kept is not None:
        expected = expected * kept[..., None]
    assert torch.equal(back, expected)
    assert torch.autograd.gradcheck(lambda t: gather_copies(spread_tokens(t, order).sin(), order), (tokens,))


def test_reordering_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    order = torch.randperm(6, generator=generator)
    assert torch.equal(reorder_rows(rows, order, order.argsort()), rows[order])
    assert torch.autograd.gradcheck(lambda r: reorder_rows(r, order, order.argsort()).sin(), (rows,))


def test_choices_are_counted_by_row() -> None:
    experts = torch.tensor([[0, 3, 3], [1, 1, 1]])
    assert count_choices(experts, 4).tolist() == [[1, 0, 0, 2], [0, 3, 0, 0]]
