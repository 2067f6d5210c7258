"""Joined linears compute what separate ones do, and step aside for modules that are more than a linear."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from trainwright.models import build_model, preset
from trainwright.models import projection as projection_module
from trainwright.models.projection import project_together


@pytest.mark.parametrize("bias", [False, True])
def test_joined_equals_separate_with_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(32, size, bias=bias) for size in (16, 8, 8)]
    inputs = torch.randn(2, 5, 32)
    results = []
    for autocast in (True, False):
        x = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = project_together(x, *linears)
        torch.cat(outputs, -1).float().square().sum().backward()
        results.append([*outputs, x.grad, *(p.grad.clone() for linear in linears for p in linear.parameters())])
        for linear in linears:
            linear.zero_grad()
    assert results[0][0].dtype == torch.bfloat16
    for joined, separate in zip(*results, strict=True):
        torch.testing.assert_close(joined.float(), separate.float(), rtol=0.05, atol=0.05)


def test_joined_only_where_weights_are_rounded_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counting(*arguments: object) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        return original(*arguments)  # type: ignore[arg-type]

    original = projection_module.fused_linear
    monkeypatch.setattr(projection_module, "fused_linear", counting)
    model = build_model(preset("llama-1m", vocab_size=32))
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids)
    assert calls == 0, "fp32"
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert calls == 2 * len(model.blocks)
    with torch.autocast("cpu", torch.bfloat16):
        model.bfloat16()(ids)
    assert calls == 2 * len(model.blocks), "weights that are bf16 already"


def test_adapters_and_hooks_are_called() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    plain, adapter, hooked = nn.Linear(4, 4), Adapter(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output + 2)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for module in (adapter, hooked):
            outputs = project_together(x, plain, module)
            torch.testing.assert_close(outputs[1], module(x), rtol=0, atol=0)
            assert not torch.allclose(outputs[1], nn.functional.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("name", ["llama-1m", "gpt2-nano"])
def test_autocast_is_near_fp32(name: str) -> None:
    config = dataclasses.replace(preset(name), initializer_range=0.05)
    model = build_model(config).eval()
    ids = torch.randint(0, 65, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02
