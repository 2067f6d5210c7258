"""Updates in the backward pass: the bits of an ordinary step, with few gradients in memory at any time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError
from trainwright.optim import GroupedOptimizer, OptimizerOptions, StepInBackward, build_optimizer, gradient_norm
from trainwright.optim.options import NAMES


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(16, 16), nn.GELU()]
    made = nn.Sequential(*layers, nn.Linear(16, 4)).to(dtype)
    made.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype)))
    made[2].weight = made[4].weight  # tied: its gradient is complete only when both uses have given theirs
    return made


def loss_of(module: nn.Module, step: int) -> Tensor:
    torch.manual_seed(100 + step)
    weight = next(module.parameters())
    return module(torch.randn(8, 16).to(weight.dtype)).float().square().sum()


def optimizer_of(module: nn.Module, name: str, update: str = "master") -> GroupedOptimizer:
    options = OptimizerOptions(name=name, lr=0.01, half_update=update, newton_schulz_dtype="float32")
    return build_optimizer(module.named_parameters(), options)


def run_ordinary(name: str, dtype: torch.dtype, update: str, micro: int) -> tuple[nn.Module, list[float]]:
    module = model(dtype)
    optimizer = optimizer_of(module, name, update)
    norms = []
    for step in range(4):
        for part in range(micro):
            loss_of(module, step * micro + part).backward()
        norms.append(float(gradient_norm(module.parameters())))
        optimizer.step(gradient_factor=torch.tensor(1 / 32))
        optimizer.zero_grad()
    return module, norms


def run_released(name: str, dtype: torch.dtype, update: str, micro: int) -> tuple[nn.Module, list[float]]:
    module = model(dtype)
    optimizer = optimizer_of(module, name, update)
    stepping = StepInBackward(optimizer)
    norms = []
    for step in range(4):
        for part in range(micro):
            loss = loss_of(module, step * micro + part)
            if part == micro - 1:
                stepping.arm(gradient_factor=torch.tensor(1 / 32))
            loss.backward()
        stepping.finish()
        norms.append(float(stepping.gradient_norm()))
        assert all(p.grad is None for p in module.parameters())
    assert optimizer.steps == 4
    return module, norms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro", [1, 3])
def test_equals_the_ordinary_step_bit_by_bit(name: str, micro: int) -> None:
    (ordinary, norms), (released, found) = (
        run(name, torch.float32, "master", micro) for run in (run_ordinary, run_released)
    )
    assert found == pytest.approx(norms, rel=1e-6)
    for (key, a), b in zip(ordinary.named_parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("update", ["master", "kahan", "stochastic"])
def test_equals_it_in_bf16_too(update: str) -> None:
    (ordinary, _), (released, _) = (run("adamw", torch.bfloat16, update, 1) for run in (run_ordinary, run_released))
    for a, b in zip(ordinary.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)


def test_few_gradients_are_in_memory_at_once() -> None:
    module = model()
    optimizer = optimizer_of(module, "sgd")
    stepping = StepInBackward(optimizer)
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(parameter: Tensor) -> None:
        nonlocal most
        gradient = parameter.grad
        if gradient is not None:
            seen.append(weakref.ref(gradient))
        del gradient
        alive = {id(found): found.nbytes for ref in seen if (found := ref()) is not None}
        most = max(most, sum(alive.values()))

    stepping.close()
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(watch)  # before ours: sees the gradient
    stepping = StepInBackward(optimizer)
    stepping.arm(0.1)
    gc.collect()
    loss_of(module, 0).backward()
    stepping.finish()
    whole = sum(p.nbytes for p in module.parameters())
    largest = max(p.nbytes for p in module.parameters())
    assert most == largest, f"{most} bytes of gradients at once, of {whole}"


def test_a_gradient_of_an_earlier_micro_batch_is_not_lost() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    before = module["b"].weight.detach().clone()
    stepping = StepInBackward(optimizer_of(module, "sgd"))
    module["b"](torch.ones(1, 2)).sum().backward()
    stepping.arm()
    module["a"](torch.ones(1, 2)).sum().backward()
    assert module["a"].weight.grad is None
    assert torch.equal(module["b"].weight, before)
    stepping.finish()
    assert module["b"].weight.grad is None
    assert not torch.equal(module["b"].weight, before)


def test_unarmed_gradients_stay_and_closing_takes_the_hooks_off() -> None:
    module = model()
    stepping = StepInBackward(optimizer_of(module, "sgd"))
    loss_of(module, 0).backward()
    assert module[0].weight.grad is not None
    module.zero_grad()
    stepping.arm()
    with pytest.raises(RuntimeError, match="not finished"):
        stepping.arm()
    stepping.finish()
    with pytest.raises(RuntimeError, match="no step to finish"):
        stepping.finish()
    stepping.arm()
    stepping.close()
    loss_of(module, 0).backward()
    assert module[0].weight.grad is not None


def test_clipping_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be clipped to 1"):
        StepInBackward(optimizer_of(model(), "adamw"), clip_norm=1.0)
