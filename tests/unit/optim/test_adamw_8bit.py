"""AdamW with 8-bit moments: its codes are torchao's, its training is close to AdamW's, its state resumes and fits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainwright.base.errors import MissingDependencyError
from trainwright.optim import GroupedOptimizer, OptimizerOptions, build_optimizer
from trainwright.optim import adamw_8bit as eight
from trainwright.optim.adamw_8bit import block_size, decode, encode

quant = pytest.importorskip("torchao.optim.quant_utils")

SHAPES = {
    "up.weight": (24, 256),
    "down.weight": (7, 320),
    "experts": (3, 4, 64),
    "odd.weight": (5, 100),
    "bias": (256,),
}


def made(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[dict[str, nn.Parameter], GroupedOptimizer]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    options = OptimizerOptions(name="adamw_8bit", lr=0.01, **changes)
    return parameters, build_optimizer(parameters.items(), options)


def train(parameters: dict[str, nn.Parameter], optimizer: GroupedOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step(gradient_factor=0.1)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed: bool) -> None:
    torch.manual_seed(1)
    values = torch.randn(64, 256) * torch.logspace(-9, 3, 64)[:, None]
    values = values if signed else values.abs()
    values[3] = 0
    codes, scales = torch.empty(64, 256, dtype=torch.uint8), torch.empty(64)
    encode(values, codes, scales, signed=signed)
    table = torch.tensor(quant.create_dynamic_map(signed=signed))
    scaled, expected_scales = quant.scale_tensor(values, 256)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, quant.quantize_8bit_with_qmap(scaled, table))
    assert torch.equal(decode(codes, scales, signed=signed), quant.dequant_with_qmap(codes, table, scales))


def test_a_run_equals_torchaos_adamw8bit() -> None:
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    parameters, optimizer = made()
    other = parameters["up.weight"].detach().clone()
    first = OptimState8bit.zeros(other.shape, True, 256)
    second = OptimState8bit.zeros(other.shape, False, 256)
    step = torch.tensor(0.0)
    for number in range(10):
        train(parameters, optimizer, range(number, number + 1))
        generator = torch.Generator().manual_seed(number)
        grad = torch.randn(other.shape, generator=generator) * 0.1
        step += 1
        rate = torch.tensor(0.01)
        single_param_adam(other, grad, step, first, second, None, rate, 0.9, 0.95, 0.1, 1e-8, True, False)
    torch.testing.assert_close(parameters["up.weight"].detach(), other, rtol=1e-5, atol=1e-6)
    state = optimizer.state_dict()["parameters"]["up.weight"]
    assert float((state["exp_avg"] != first.codes).float().mean()) < 1e-3


def test_state_is_two_bytes_a_number_and_plain() -> None:
    parameters, optimizer = made()
    state = optimizer.state_dict()["parameters"]
    for name, p in parameters.items():
        block = block_size(p.shape)
        assert block == {"up.weight": 256, "down.weight": 64, "experts": 256}.get(name)
        assert all(type(tensor) is Tensor for tensor in state[name].values())
        size = sum(t.nbytes for key, t in state[name].items() if key != "step")
        assert size == (8 * p.numel() if block is None else 2 * p.numel() + 8 * p.numel() // block)


def test_training_stays_close_to_adamw() -> None:
    def loss_after(name: str, steps: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        inputs = torch.randn(128, 64)
        targets = torch.sin(inputs.roll(1, 1) * 2)
        options = OptimizerOptions(name=name, lr=3e-3, weight_decay=0.0)
        optimizer = build_optimizer(model.named_parameters(), options)
        loss = torch.tensor(0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    start, exact, found = loss_after("adamw", 1), loss_after("adamw", 200), loss_after("adamw_8bit", 200)
    assert exact < 0.2 * start
    assert abs(found - exact) < 0.05 * start


@pytest.mark.parametrize(
    ("dtype", "update"),
    [(torch.float32, "master"), (torch.bfloat16, "master"), (torch.bfloat16, "kahan"), (torch.bfloat16, "stochastic")],
)
def test_resume_is_bitwise_through_files(dtype: torch.dtype, update: str, tmp_path: Path) -> None:
    undisturbed, optimizer = made(dtype, half_update=update)
    train(undisturbed, optimizer, range(8))
    first, optimizer = made(dtype, half_update=update)
    train(first, optimizer, range(4))
    saved = optimizer.state_dict()
    save_file({f"{p}|{k}": t.clone() for p, s in saved["parameters"].items() for k, t in s.items()}, tmp_path / "s")
    parameters: dict[str, dict[str, Tensor]] = {name: {} for name in SHAPES}
    for key, tensor in load_file(tmp_path / "s").items():
        parameters[key.partition("|")[0]][key.partition("|")[2]] = tensor
    second, resumed = made(dtype, half_update=update)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    resumed.load_state_dict(saved | {"parameters": parameters})
    train(second, resumed, range(4, 8))
    assert all(torch.equal(second[name], p) for name, p in undisturbed.items())


def test_pieces_of_work_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, optimizer = made()
    train(whole, optimizer, range(4))
    monkeypatch.setattr(eight, "PIECE", 512)
    pieces, optimizer = made()
    train(pieces, optimizer, range(4))
    assert all(torch.equal(pieces[name], p) for name, p in whole.items())


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    eight._table.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    with pytest.raises(MissingDependencyError, match=r"trainwright\[torchao\]"):
        made()[1].materialise_state()
    eight._table.cache_clear()
