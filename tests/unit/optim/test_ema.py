"""The moving average: against its definition, swapped in and out, resumed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.protocols import Stateful
from trainwright.optim import EMA


def drive(ema: EMA, weight: nn.Parameter, seen: list[float]) -> None:
    for value in seen:
        with torch.no_grad():
            weight.fill_(value)
        ema.update()


def test_plain_average_follows_the_definition() -> None:
    weight = nn.Parameter(torch.full((2,), 4.0))
    ema = EMA([("w", weight)], decay=0.9, bias_free=False)
    drive(ema, weight, [1.0, 2.0])
    assert ema.averages["w"][0].item() == pytest.approx(0.9 * (0.9 * 4.0 + 0.1 * 1.0) + 0.1 * 2.0)


def test_bias_free_average_forgets_the_initial_weights() -> None:
    weight = nn.Parameter(torch.full((2,), 1e6))
    ema = EMA([("w", weight)], decay=0.9)
    seen = [3.0, -1.0, 2.0, 5.0]
    drive(ema, weight, seen)
    shares = [0.9**age for age in reversed(range(len(seen)))]
    expected = sum(s * v for s, v in zip(shares, seen, strict=True)) / sum(shares)
    assert ema.averages["w"][0].item() == pytest.approx(expected, rel=1e-5)


def test_applied_swaps_in_and_gives_the_same_bits_back_even_after_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).to(torch.bfloat16)
    ema = EMA(model.named_parameters(), decay=0.5)
    ema.update()
    with torch.no_grad():
        model.weight.mul_(1.7)
    own = model.weight.detach().clone()
    address = model.weight.data_ptr()
    with ema.applied():
        assert torch.equal(model.weight, ema.averages["weight"].to(torch.bfloat16))
        assert not torch.equal(model.weight, own)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)
    assert model.weight.data_ptr() == address


def test_resume_is_exact() -> None:
    def fresh() -> tuple[nn.Parameter, EMA]:
        weight = nn.Parameter(torch.zeros(2))
        return weight, EMA([("w", weight), ("tied", weight)], decay=0.99)

    weight, undisturbed = fresh()
    drive(undisturbed, weight, [0.1, 0.7, 0.3, 0.9])
    weight, first = fresh()
    drive(first, weight, [0.1, 0.7])
    weight, second = fresh()
    second.load_state_dict(first.state_dict())
    drive(second, weight, [0.3, 0.9])
    assert isinstance(second, Stateful)
    assert torch.equal(undisturbed.averages["w"], second.averages["w"])
    assert list(second.averages) == ["w"]


def test_foreign_state_is_refused() -> None:
    ema = EMA([("w", nn.Parameter(torch.zeros(2)))])
    with pytest.raises(CheckpointError, match="names differ"):
        ema.load_state_dict({"steps": 1, "averages": {"v": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"shape \[3\], expected \[2\]"):
        ema.load_state_dict({"steps": 1, "averages": {"w": torch.zeros(3)}})
    with pytest.raises(ConfigError, match="ema decay is 1"):
        EMA([], decay=1.0)
