"""Milliseconds that one optimizer step of the 34M-parameter llama takes, clipping included, in turns A B A B.

    python benchmarks/optim/optimizer_step.py [--rounds 9]

The gradients are there already, as after a backward pass. The first line is what a plain copy of as many fp32 numbers
takes (8 bytes each): AdamW has to read and write 28 bytes a parameter, so 3.5 copies are the floor without tricks.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from trainwright.ops.cpu_runtime import tune_cpu_runtime
from trainwright.optim import OptimizerOptions, build_optimizer, clip_factor, clip_gradients, gradient_norm
from trainwright.optim.options import HALF_UPDATES, NAMES

HIDDEN, LAYERS, VOCABULARY, INTERMEDIATE = 512, 8, 8192, 1408
TOKENS = 4096


def parameters() -> list[tuple[str, nn.Parameter]]:
    """A llama of 8 layers, width 512, untied embeddings, with gradients: 34.1M parameters."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes += [(f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)) for name in "qkvo"]
        shapes += [(f"{prefix}.mlp.{name}_proj.weight", (INTERMEDIATE, HIDDEN)) for name in ("gate", "up")]
        shapes += [(f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))]
        shapes += [(f"{prefix}.{name}_layernorm.weight", (HIDDEN,)) for name in ("input", "post_attention")]
    shapes += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
    torch.manual_seed(0)
    made = [(name, nn.Parameter(torch.randn(shape) * 0.02)) for name, shape in shapes]
    for _, parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def in_bf16(named: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    made = [(name, nn.Parameter(parameter.detach().bfloat16())) for name, parameter in named]
    for (_, parameter), (_, original) in zip(made, named, strict=True):
        assert original.grad is not None
        parameter.grad = original.grad.bfloat16()
    return made


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times) * 1e3:.1f} | {min(times) * 1e3:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    tune_cpu_runtime()  # as every run does
    named = parameters()
    weights = [parameter for _, parameter in named]
    count = sum(weight.numel() for weight in weights)
    fused = build_optimizer(named, OptimizerOptions(lr=1e-5))
    plain = build_optimizer(named, OptimizerOptions(lr=1e-5, fused=False))
    source, target = torch.randn(count), torch.empty(count)

    def folded() -> None:
        fused.step(gradient_factor=clip_factor(gradient_norm(weights), 1.0, scale=1 / TOKENS))

    def separate() -> None:
        clip_gradients(weights, 1.0, scale=1 / TOKENS)
        fused.step()

    def usual() -> None:
        torch._foreach_mul_([weight.grad for weight in weights], 1 / TOKENS)
        nn.utils.clip_grad_norm_(weights, 1.0)
        plain.step()

    print(f"{count / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | median ms | fastest ms |\n|---|---|---|")
    alternate({"copy of as many numbers": lambda: target.copy_(source)}, rounds)
    alternate(
        {
            "AdamW fused, scaling and clipping folded in": folded,
            "AdamW fused, scaling and clipping as one pass": separate,
            "torch's defaults: foreach AdamW, clip_grad_norm_": usual,
        },
        rounds,
    )
    halves = in_bf16(named)
    ways = {way: build_optimizer(halves, OptimizerOptions(lr=1e-5, half_update=way)) for way in HALF_UPDATES}
    alternate({f"AdamW, bf16 weights, {way}": optimizer.step for way, optimizer in ways.items()}, rounds)
    del halves, ways
    for name in NAMES[1:]:
        if name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
            continue
        optimizer = build_optimizer(named, OptimizerOptions(name=name, lr=1e-6))
        alternate({f"{name}, without clipping": optimizer.step}, 3 if name in ("muon", "adamw_8bit") else rounds)
        del optimizer


if __name__ == "__main__":
    main()
