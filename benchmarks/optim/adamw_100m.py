"""Milliseconds that one AdamW step over 100M fp32 parameters takes, on tensors of a llama's shapes, in turns A B A B.

    python benchmarks/optim/adamw_100m.py [--turns 5] [--steps 6] [--deepspeed-python PATH]

Each contender is a process of its own: ours (`GroupedOptimizer.step`), `torch.optim.AdamW(fused=True)` and, where PATH
is the Python of an environment with DeepSpeed, its `DeepSpeedCPUAdam` (compiled on first use). Gradients are there
already. "Scaled" is what a training step needs, the gradients times one number (1 / tokens, clipping, loss scale) and
the update: ours folds the number in, the others multiply first. "Alone" is the update only.

Memory bounds it: the update alone moves 28 bytes a parameter (four streams read, three written). The last line is a
plain `a += b` of as many numbers, 12 bytes each: no step can move its bytes much faster than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from alternate import Contender, alternate, take_turns
from torch import nn

HIDDEN, LAYERS, VOCABULARY, INTERMEDIATE = 768, 12, 20480, 2048


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    """A llama of 12 layers, width 768, tied embeddings: 100.7M parameters."""
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found += [(f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)) for name in "qkvo"]
        found += [(f"{prefix}.mlp.{name}_proj.weight", (INTERMEDIATE, HIDDEN)) for name in ("gate", "up")]
        found += [(f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))]
        found += [(f"{prefix}.{name}_layernorm.weight", (HIDDEN,)) for name in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (HIDDEN,))]


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    made = [(name, nn.Parameter(torch.randn(shape) * 0.02)) for name, shape in shapes()]
    for _, parameter in made:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return made


FACTOR = 0.9999  # near 1: the gradients stay what they are over many steps


def ours(scaled: bool) -> Callable[[], object]:
    from trainwright.optim import OptimizerOptions, build_optimizer

    optimizer = build_optimizer(parameters(), OptimizerOptions(lr=1e-6))
    factor = torch.tensor(FACTOR)
    return (lambda: optimizer.step(gradient_factor=factor)) if scaled else optimizer.step


def torch_fused(scaled: bool) -> Callable[[], object]:
    weights = [parameter for _, parameter in parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return _scaled_first(weights, optimizer.step) if scaled else optimizer.step


def deepspeed(scaled: bool) -> Callable[[], object]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weights = [parameter for _, parameter in parameters()]
    optimizer = DeepSpeedCPUAdam(weights, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, adamw_mode=True)
    return _scaled_first(weights, optimizer.step) if scaled else optimizer.step


def _scaled_first(weights: list[nn.Parameter], step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for weight in weights:
            assert weight.grad is not None
            weight.grad.mul_(FACTOR)
        step()

    return run


def plain_sum() -> Callable[[], object]:
    count = sum(torch.Size(shape).numel() for _, shape in shapes())
    total, part = torch.zeros(count), torch.ones(count)
    return lambda: total.add_(part)


THEIRS = "DeepSpeedCPUAdam"
SIDES: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
    "ours, scaled": (lambda: ours(True), 32),
    "torch.optim.AdamW(fused=True), scaled": (lambda: torch_fused(True), 36),
    f"{THEIRS}, scaled": (lambda: deepspeed(True), 36),
    "ours, alone": (lambda: ours(False), 28),
    "torch.optim.AdamW(fused=True), alone": (lambda: torch_fused(False), 28),
    f"{THEIRS}, alone": (lambda: deepspeed(False), 28),
    "a += b": (plain_sum, 12),
}
"""What to run, and how many bytes a parameter it has to move."""


def side(name: str) -> None:
    def train(step_done: Callable[..., None]) -> None:
        step = SIDES[name][0]()
        while True:
            step()
            step_done()

    take_turns(train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--deepspeed-python", default=None)
    parser.add_argument("--side", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side)
        return
    contenders: list[Contender] = []
    for name in SIDES:
        if not name.startswith(THEIRS):
            contenders.append(Contender(name))
        elif arguments.deepspeed_python:
            contenders.append(Contender(name, python=arguments.deepspeed_python))
    alternate(contenders, turns=arguments.turns, steps=arguments.steps, warmup=2)
    count = sum(torch.Size(shape).numel() for _, shape in shapes())
    print(f"\n{count / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| step | median ms | turns, ms | bytes a parameter | GB/s |\n|---|---|---|---|---|")
    for contender in contenders:
        low, high = contender.spread()
        pace, size = contender.seconds(), SIDES[contender.name][1]
        print(
            f"| {contender.name} | {pace * 1e3:.1f} | {low * 1e3:.1f}-{high * 1e3:.1f} | {size} | "
            f"{size * count / pace / 1e9:.0f} |"
        )


if __name__ == "__main__":
    main()
