"""bf16 parameters without an fp32 copy: Kahan compensation and stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.optim import GroupedOptimizer, OptimizerOptions, build_optimizer

UPDATES = ("master", "kahan", "stochastic")


def options(name: str, update: str, lr: float = 0.01, **changes: object) -> OptimizerOptions:
    return OptimizerOptions(name=name, lr=lr, half_update=update, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("update", UPDATES)
def test_many_tiny_updates_arrive(update: str) -> None:
    """400 updates of 2 ** -13 at 1: each is 1/64 of bf16's spacing, together 0.0488."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    nearest = weight.detach().clone()
    optimizer = build_optimizer([("w", weight)], options("sgd", update, lr=2**-13, momentum=0.0, weight_decay=0.0))
    for _ in range(400):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        nearest += 2**-13
    assert torch.equal(nearest, torch.ones_like(nearest)), "rounding to nearest stalls, or this shows nothing"
    found = weight.detach().double()
    assert float(found.mean()) == pytest.approx(1 + 400 * 2**-13, abs=5e-4 if update == "stochastic" else 4e-3)
    if update != "stochastic":
        assert float(found.std()) == 0


def test_kahan_keeps_about_sixteen_bits() -> None:
    torch.manual_seed(0)
    start = torch.randn(1000).to(torch.bfloat16)
    weight, exact = nn.Parameter(start.clone()), start.double()
    optimizer = build_optimizer([("w", weight)], options("sgd", "kahan", lr=1e-4, momentum=0.0, weight_decay=0.0))
    for step in range(200):
        torch.manual_seed(step)
        grad = torch.randn(1000).to(torch.bfloat16)
        weight.grad = grad
        optimizer.step()
        exact -= 1e-4 * grad.double()
    kept = weight.detach().double() + optimizer.state_dict()["parameters"]["w"]["compensation"].double()
    assert float((kept - exact).abs().max()) < 2e-4
    assert float((weight.detach().double() - exact).abs().max()) < 0.02, "the parameter is the nearest bf16 number"


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("update", ["kahan", "stochastic"])
def test_state_has_no_fp32_copy_of_the_weights(name: str, update: str) -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer([("w", weight)], options(name, update))
    optimizer.step()
    state = optimizer.state_dict()["parameters"]["w"]
    assert "master" not in state
    assert ("compensation" in state) == (update == "kahan")
    if update == "kahan":
        assert state["compensation"].dtype == torch.bfloat16
    moments = [t for key, t in state.items() if key.startswith(("exp", "momentum"))]
    assert moments
    assert all(t.dtype == torch.float32 for t in moments)


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def regress(module: nn.Module, optimizer: GroupedOptimizer | None, steps: range, lr: float = 0.0) -> float:
    """Fit a fixed function; without an optimizer by plain bf16 SGD. Returns the fp32 loss on all data."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(256, 16, generator=generator)
    targets = torch.sin(inputs[:, :4] * 2)
    dtype = next(module.parameters()).dtype
    for step in steps:
        rows = torch.arange(32) + 32 * (step % 8)
        loss = (module(inputs[rows].to(dtype)).float() - targets[rows]).square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for p in module.parameters():
            if optimizer is None:
                with torch.no_grad():
                    p -= lr * p.grad
            p.grad = None
    with torch.no_grad():
        return float((module.float()(inputs) - targets).square().mean())


@pytest.mark.parametrize("update", UPDATES)
def test_training_ends_nearer_to_fp32_than_plain_bf16(update: str) -> None:
    lr, steps = 0.01, range(600)
    exact, plain, mine = model(torch.float32), model(torch.bfloat16), model(torch.bfloat16)
    chosen = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0}
    expected = regress(exact, build_optimizer(exact.named_parameters(), options("sgd", "master", **chosen)), steps)
    stalled = regress(plain, None, steps, lr)
    found = regress(mine, build_optimizer(mine.named_parameters(), options("sgd", update, **chosen)), steps)
    assert abs(stalled - expected) > 0.01, "plain bf16 does no harm here: this test shows nothing"
    assert abs(found - expected) < 0.35 * abs(stalled - expected), (update, expected, stalled, found)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("update", UPDATES)
def test_resume_is_bitwise(name: str, update: str) -> None:
    def made() -> tuple[nn.Module, GroupedOptimizer]:
        module = model(torch.bfloat16)
        return module, build_optimizer(module.named_parameters(), options(name, update, seed=3))

    def train(module: nn.Module, optimizer: GroupedOptimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape).to(p.dtype)
            optimizer.step(gradient_factor=0.3)

    undisturbed, optimizer = made()
    train(undisturbed, optimizer, range(8))
    first, optimizer = made()
    train(first, optimizer, range(4))
    second, resumed = made()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(4, 8))
    for a, b in zip(undisturbed.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_rounding_depends_on_seed_step_and_name_only() -> None:
    def after(seed: int, names: tuple[str, str], steps: int) -> list[Tensor]:
        made = [nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in names]
        optimizer = build_optimizer(
            zip(names, made, strict=True), options("sgd", "stochastic", lr=1e-3, momentum=0.0, seed=seed)
        )
        for _ in range(steps):
            for p in made:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach() for p in made]

    first, second = after(0, ("a", "b"), 1)
    assert not torch.equal(first, second)
    swapped = after(0, ("b", "a"), 1)
    assert torch.equal(first, swapped[1])
    assert torch.equal(second, swapped[0])
    assert not torch.equal(first, after(1, ("a", "b"), 1)[0])


@pytest.mark.parametrize("update", UPDATES)
def test_weights_that_are_loaded_alone_are_trained_on(update: str) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", weight)], options("sgd", update, lr=2**-12, momentum=0.0, weight_decay=0.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight.fill_(5.0)
    optimizer.weights_changed()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 5.0))


def test_impossible_combinations_are_refused() -> None:
    for name in ("muon", "adafactor"):
        with pytest.raises(ConfigError, match=f"optimizer {name} cannot update bf16 parameters by 'kahan'"):
            options(name, "kahan")
    with pytest.raises(ConfigError, match="half_update is 'sometimes'"):
        options("adamw", "sometimes")
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ConfigError, match="w is fp16"):
        build_optimizer([("w", weight)], options("adamw", "stochastic"))


def test_state_of_another_way_is_refused() -> None:
    def made(update: str) -> GroupedOptimizer:
        return build_optimizer(model(torch.bfloat16).named_parameters(), options("adamw", update))

    with pytest.raises(CheckpointError, match=r"holds \['exp_avg', 'exp_avg_sq', 'master', 'step'\], expected"):
        made("kahan").load_state_dict(made("master").state_dict())


def test_fp32_parameters_are_not_concerned() -> None:
    results = []
    for update in UPDATES:
        module = model(torch.float32)
        optimizer = build_optimizer(module.named_parameters(), options("adamw", update))
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert math.isfinite(float(results[0][0].sum()))
