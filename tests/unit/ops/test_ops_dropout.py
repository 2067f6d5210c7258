"""The counter-based dropout mask: its rate, its independence of whatever it must be independent of, and of the cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainwright.ops import dropout
from trainwright.ops.dropout import drop, head_keys, keep_mask, site_keys, token_keys

ROWS, TOKENS, FEATURES = 16, 256, 512
COUNT = ROWS * TOKENS * FEATURES  # two million
LIMIT = 5.0  # standard deviations; by chance one comparison in 1.7 million is outside


def mask(seed: int = 3, site: int = 11, p: float = 0.5, first_row: int = 0, first_position: int = 0) -> Tensor:
    rows = torch.arange(first_row, first_row + ROWS)
    positions = torch.arange(first_position, first_position + TOKENS)
    return keep_mask(site_keys(token_keys(seed, rows, positions), site), torch.arange(FEATURES), p)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of what independent masks show."""
    x, y = a.flatten().double(), b.flatten().double()
    x, y = x - x.mean(), y - y.mean()
    return abs(float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt())) * math.sqrt(x.numel())


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    for seed in range(3):
        dropped = ~mask(seed=seed, p=p)
        deviation = math.sqrt(p * (1 - p) / COUNT)
        assert abs(float(dropped.double().mean()) - p) < LIMIT * deviation
        # Not only on the whole: by row, by position and by feature the counts scatter as binomial ones do.
        for dims in ((1, 2), (0, 2), (0, 1)):
            counts = dropped.double().sum(dims)
            trials = COUNT // counts.numel()
            chi2 = float(((counts - trials * p) ** 2 / (trials * p * (1 - p))).sum())
            n = counts.numel()
            assert abs(chi2 - n) < LIMIT * math.sqrt(2 * n), (p, seed, dims)


def test_zero_drops_nothing() -> None:
    assert mask(p=0.0).all()
    x = torch.randn(2, 3, 4)
    assert drop(x, torch.zeros(2, 3, dtype=torch.int64), 0.0) is x


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_seeds_sites_rows_and_positions_are_independent(p: float) -> None:
    base = mask(p=p)
    others = [mask(seed=seed, p=p) for seed in (0, 1, 2, 4, -3, 2**62)]
    others += [mask(site=site, p=p) for site in (0, 1, 10, 12, 2**40 + 11, -11)]
    others += [mask(first_row=ROWS, p=p), mask(first_position=TOKENS, p=p), mask(first_row=1 << 40, p=p)]
    others += [mask(seed=11, site=3, p=p), mask(first_row=TOKENS, first_position=ROWS, p=p)]
    for index, other in enumerate(others):
        assert correlation(base, other) < LIMIT, index


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p: float) -> None:
    base = mask(p=p)
    for dim in range(3):
        for lag in (1, 2, 3, 4, 7, 8) if dim == 0 else (1, 2, 3, 4, 8, 16, 31, 32, 64, 128, 255):
            size = base.shape[dim] - lag
            assert correlation(base.narrow(dim, 0, size), base.narrow(dim, lag, size)) < LIMIT, (dim, lag)
    swapped = base[:, :, :TOKENS].transpose(1, 2)
    off_diagonal = ~torch.eye(TOKENS, dtype=torch.bool).expand(ROWS, -1, -1)
    assert correlation(base[:, :, :TOKENS][off_diagonal], swapped[off_diagonal]) < LIMIT * math.sqrt(2)


def test_patterns_of_eight_neighbours_are_equally_frequent() -> None:
    """All 256 patterns along each dimension: what pairs of lags would not show (chi-square, 255 degrees)."""
    base = mask(p=0.5).long()
    weights = 2 ** torch.arange(8)
    for dim in range(3):
        patterns = (base.movedim(dim, -1).unflatten(-1, (-1, 8)) * weights).sum(-1).flatten()
        counts = torch.bincount(patterns, minlength=256).double()
        expected = patterns.numel() / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < LIMIT * math.sqrt(2 * 255), dim


def test_no_line_of_the_spectrum_stands_out() -> None:
    """Periods of any length along features or positions would be lines of the two-dimensional power spectrum."""
    base = mask(p=0.5)[0].double() - 0.5
    power = torch.fft.fft2(base).abs().square() / (0.25 * base.numel())
    power[0, 0] = 0.0
    # The greatest of n exponential variables: P(any > x) = n exp(-x); x = 25 is one in a million here.
    assert float(power.max()) < 25.0


def test_heads_and_keys_of_attention_are_independent() -> None:
    keys = head_keys(site_keys(token_keys(1, torch.arange(4), torch.arange(64)), 5), 8)
    kept = keep_mask(keys, torch.arange(64), 0.1)
    assert kept.shape == (4, 8, 64, 64)
    assert correlation(kept[:, :4], kept[:, 4:]) < LIMIT
    assert correlation(kept[..., :32], kept[..., 32:]) < LIMIT
    assert correlation(kept[:, :, :32], kept[:, :, 32:]) < LIMIT
    lower = torch.tril(torch.ones(64, 64, dtype=torch.bool), -1).expand(4, 8, -1, -1)
    assert correlation(kept[lower], kept.transpose(2, 3)[lower]) < LIMIT


def test_any_cut_gives_the_parts_of_the_whole() -> None:
    positions = torch.arange(40).repeat(6, 1) % 17
    documents = torch.arange(40).repeat(6, 1) // 17
    rows = torch.arange(6) + 100
    whole = token_keys(9, rows, positions, documents)
    assert whole.unique().numel() == whole.numel(), "positions start anew, but every token has its own key"
    part = token_keys(9, rows[2:4], positions[2:4, 8:24], documents[2:4, 8:24])
    assert torch.equal(part, whole[2:4, 8:24])
    x = torch.randn(6, 40, 32)
    dropped = drop(x, whole, 0.3)
    assert torch.equal(drop(x[2:4, 8:24], part, 0.3), dropped[2:4, 8:24])
    assert torch.equal(drop(x[..., 10:20], whole, 0.3, first_feature=10), dropped[..., 10:20])
    heads = keep_mask(head_keys(whole, 6), torch.arange(40), 0.3)
    assert torch.equal(keep_mask(head_keys(whole, 2, first_head=4), torch.arange(40), 0.3), heads[:, 4:])
    assert torch.equal(keep_mask(head_keys(whole, 6), torch.arange(20, 40), 0.3), heads[..., 20:])
    by_row = torch.arange(40).expand(6, 1, 1, -1)
    assert torch.equal(keep_mask(head_keys(whole, 6), by_row, 0.3), heads)


def test_rows_without_documents_are_one_document() -> None:
    rows, positions = torch.arange(3), torch.arange(5)
    expected = token_keys(1, rows, positions)
    assert torch.equal(token_keys(1, rows, positions.expand(3, -1)), expected)
    assert torch.equal(token_keys(1, rows, positions, torch.zeros(3, 5, dtype=torch.int32)), expected)


def test_pieces_in_the_cache_and_the_compiler_give_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = site_keys(token_keys(5, torch.arange(3), torch.arange(50)), 2)
    index = torch.arange(37)
    monkeypatch.setattr(dropout, "_CHUNK", 1 << 30)
    at_once = keep_mask(keys, index, 0.2)
    for chunk in (1, 100, 37 * 7):
        monkeypatch.setattr(dropout, "_CHUNK", chunk)
        assert torch.equal(keep_mask(keys, index, 0.2), at_once)


@pytest.mark.parametrize(("p", "features"), [(0.2, 37), (0.5, 37), (0.5, 256)])
def test_the_compiler_gives_the_same_mask(p: float, features: int) -> None:
    """Overflow of signed numbers is the compiler's to exploit: at p = 0.5 the threshold is zero."""
    torch._dynamo.reset()
    site = torch.tensor(2)
    compiled = torch.compile(lambda k, x: drop(x, site_keys(k, site), p), dynamic=False)
    keys = token_keys(5, torch.arange(3), torch.arange(50))
    x = torch.randn(3, 50, features, requires_grad=True)
    out, expected = compiled(keys, x), drop(x, site_keys(keys, site), p)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(value.square().sum(), x)[0] for value in (out, expected)))


def test_known_values() -> None:
    """The mask is part of what a seed means: a run resumed with another release must see the same."""
    keys = token_keys(2026, torch.tensor([0, 7]), torch.tensor([0, 1, 4095]))
    assert keys.flatten().tolist() == [
        6004541538313288323,
        7419194832351672917,
        -4237074590979334675,
        7580680042016076409,
        1076787249943264548,
        6024595088334603938,
    ]
    bits = keep_mask(site_keys(keys, 3), torch.arange(32), 0.5).long() * 2 ** torch.arange(32)
    assert bits.sum(-1).flatten().tolist() == [115307839, 3761530214, 2814539895, 3174165810, 3601735899, 555720177]


def test_expectation_and_gradient() -> None:
    x = torch.full((ROWS, TOKENS, FEATURES), 2.0, requires_grad=True)
    keys = site_keys(token_keys(0, torch.arange(ROWS), torch.arange(TOKENS)), 1)
    out = drop(x, keys, 0.1)
    assert float(out.detach().mean()) == pytest.approx(2.0, abs=2.0 * LIMIT * math.sqrt(0.1 / 0.9 / COUNT))
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, out.detach() / 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_mask() -> None:
    keys = site_keys(token_keys(5, torch.arange(3), torch.arange(50)), 2)
    x = torch.randn(3, 50, 37)
    there = site_keys(token_keys(5, torch.arange(3), torch.arange(50, device="cuda")), 2)
    assert torch.equal(there.cpu(), keys)
    assert torch.equal(drop(x.cuda(), there, 0.2).cpu(), drop(x, keys, 0.2))
    compiled = torch.compile(lambda k, x: drop(x, k, 0.2), dynamic=False)
    assert torch.equal(compiled(there, x.cuda()).cpu(), drop(x, keys, 0.2))
