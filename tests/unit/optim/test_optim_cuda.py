"""Optimizers on a GPU: the same rules, and nothing that makes the host wait for the device."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from trainwright.optim import EMA, OptimizerOptions, build_optimizer, clip_factor, clip_gradients, gradient_norm
from trainwright.optim.options import NAMES

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
OPTIMIZERS = [pytest.param(name, marks=needs_torchao if name == "adamw_8bit" else ()) for name in NAMES]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def model(dtype: torch.dtype = torch.float32, device: str = "cuda") -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 8))
    return layers.to(device, dtype)


def set_grads(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gpu_and_cpu_agree(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        trained = model(device=device)
        options = OptimizerOptions(name=name, lr=0.01, newton_schulz_dtype="float32")
        optimizer = build_optimizer(trained.named_parameters(), options)
        for step in range(5):
            set_grads(trained, step)
            optimizer.step(gradient_factor=clip_factor(gradient_norm(trained.parameters()), 1.0, scale=0.1))
        results.append([p.detach().cpu() for p in trained.parameters()])
    for a, b in zip(*results, strict=True):
        # A moment near the middle of two codes may become either: 2 % of an update of 0.01.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3 if name == "adamw_8bit" else 1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(name: str, dtype: torch.dtype) -> None:
    options = OptimizerOptions(name=name, lr=0.01)
    undisturbed, first, second = model(dtype), model(dtype), model(dtype)
    optimizer = build_optimizer(undisturbed.named_parameters(), options)
    for step in range(8):
        set_grads(undisturbed, step)
        optimizer.step()
    optimizer = build_optimizer(first.named_parameters(), options)
    for step in range(4):
        set_grads(first, step)
        optimizer.step()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second.named_parameters(), options)
    saved = optimizer.state_dict()
    on_disk = {p: {key: t.cpu() for key, t in state.items()} for p, state in saved["parameters"].items()}
    resumed.load_state_dict({"parameters": on_disk, "settings": saved["settings"]})
    for step in range(4, 8):
        set_grads(second, step)
        resumed.step()
    for a, b in zip(undisturbed.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_does_not_wait_for_the_gpu(name: str) -> None:
    trained = model()
    optimizer = build_optimizer(trained.named_parameters(), OptimizerOptions(name=name, lr=0.01))
    ema = EMA(trained.named_parameters())
    tokens = torch.tensor(64.0, device="cuda")
    for step in range(3):
        set_grads(trained, step)
        guard = no_waiting() if step else contextlib.nullcontext()  # the first step makes the state
        with guard:
            scale = 1 / tokens
            norm = gradient_norm(trained.parameters())
            optimizer.step(gradient_factor=clip_factor(norm, 1.0, scale=scale))
            clip_gradients(trained.parameters(), 1.0, scale=scale)
            ema.update()
