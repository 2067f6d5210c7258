"""Precision on ranks: what computes in which type, fp16 that overflows on one rank only, modules that stay in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainwright.comm import start
from trainwright.engine.initialize import initialize
from trainwright.models import build_model, preset
from trainwright.testing import run_ranks

HALF = torch.bfloat16


def make() -> nn.Module:
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "num_kv_heads": 3, "head_dim": 8}
    return build_model(preset("llama-15m", vocab_size=67, intermediate_size=50, **sizes), seed=1)


def settings(precision: Any, stage: int) -> dict[str, Any]:
    return {
        "batch": {"micro": 4},
        "optim": {"name": "adamw", "lr": 1e-2},
        "precision": precision,
        "parallel": {"zero": stage},
    }


def note(seen: dict[str, list[torch.dtype]], kind: str) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen[kind] = [output.dtype, module.weight.dtype]

    return hook


def types_in_use(rank: int, world: int, cases: list[tuple[Any, int]]) -> list[dict[str, list[torch.dtype]]]:
    """(type of the output, type of the weight) of one norm and one linear layer during a forward pass."""
    found = []
    for precision, stage in cases:
        model = make()
        engine = initialize(model=model, config=settings(precision, stage), ranks=start()).engine
        seen: dict[str, list[torch.dtype]] = {}
        for name in ("model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"):
            model.get_submodule(name).register_forward_hook(note(seen, name.split(".")[-1]))
        engine.backward(engine(torch.zeros(4, 8, dtype=torch.int64)).float().sum())
        engine.step()
        found.append(seen)
        engine.destroy()
    return found


def test_types_of_products_weights_and_kept_modules() -> None:
    fp32 = torch.float32
    kept = {"name": "bf16", "keep_fp32": ["q_proj"]}
    pure = {"name": "bf16_pure", "keep_fp32": ["layernorm", "norm$"]}
    expected = {
        ("bf16", 0): {"input_layernorm": [fp32, fp32], "q_proj": [HALF, fp32]},
        ("bf16", 3): {"input_layernorm": [fp32, HALF], "q_proj": [HALF, HALF]},
        ("kept", 0): {"input_layernorm": [fp32, fp32], "q_proj": [fp32, fp32]},
        ("kept", 3): {"input_layernorm": [fp32, HALF], "q_proj": [fp32, fp32]},
        ("pure", 2): {"input_layernorm": [HALF, fp32], "q_proj": [HALF, HALF]},
    }
    words = {"bf16": "bf16", "kept": kept, "pure": pure}
    cases = [(words[word], stage) for word, stage in expected]
    assert run_ranks(types_in_use, 2, cases, timeout=120)[0] == list(expected.values())


def overflow_on_one_rank(rank: int, world: int, stage: int) -> list[Any]:
    precision = {"name": "fp16", "initial_scale": 1024.0, "hysteresis": 1}
    engine = initialize(model=make(), config=settings(precision, stage), ranks=start()).engine
    before = [p.detach().clone() for p in engine._parameters]
    loss = engine(torch.zeros(4, 8, dtype=torch.int64)).float().sum()
    engine.backward(loss * (float("inf") if rank == 1 else 1.0))
    report = engine.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, engine._parameters, strict=True))
    engine.backward(engine(torch.zeros(4, 8, dtype=torch.int64)).float().mean())
    after = engine.step()
    result = [report.overflow, unchanged, engine.loss_scale, engine.skipped_steps, after.skipped]
    engine.destroy()
    return result


def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all() -> None:
    for stage in (0, 3):
        for result in run_ranks(overflow_on_one_rank, 2, stage, timeout=120):
            assert result == [True, True, 512.0, 1, False]
