"""What recomputing and offloading save, and what they cost: bytes held for backward and time of forward and backward.

    python benchmarks/memory/recompute.py [--preset llama-34m] [--rows 4] [--compiled] [--rounds 3]
    python benchmarks/memory/recompute.py --block llama-8b      # bytes per token, layer and unit of width

bf16 autocast, chunked loss. Every round measures each policy once; the median of the rounds counts. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from trainwright.memory import ActivationMeter, ActivationOffload, HostCopies, apply_recompute, remove_recompute
from trainwright.models import Decoder, build_model, preset, replace
from trainwright.models.llama.model import LlamaBlock
from trainwright.ops.cpu_runtime import tune_cpu_runtime
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.ops.rotary import rotary_tables

LENGTH = 512
POLICIES: dict[str, tuple[Any, bool]] = {
    "none": ("none", False),
    "every 2nd block": ({"every": 2}, False),
    "selective": ("selective", False),
    "full": ("full", False),
    "none, offloaded": ("none", True),
    "full, offloaded": ("full", True),
}


def prepare(name: str, policy: Any, offloaded: bool, compiled: bool) -> Decoder:
    model = build_model(preset(name, max_position_embeddings=LENGTH), seed=1).train()
    apply_recompute(model, policy, offload=ActivationOffload(HostCopies()) if offloaded else None)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def step(model: Decoder, ids: Tensor) -> tuple[float, int]:
    """Seconds of forward and backward, and bytes held between them."""
    start = time.perf_counter()
    with ActivationMeter(model) as meter, torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden_states(ids)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, ids.flatten()).loss_sum
    middle = time.perf_counter()
    held = meter.activations
    after = time.perf_counter()
    loss.backward()
    seconds = time.perf_counter() - after + middle - start
    model.zero_grad(set_to_none=True)
    return seconds, held


def compare(name: str, rows: int, compiled: bool, rounds: int) -> None:
    ids = torch.randint(0, 1000, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    models = {label: prepare(name, *policy, compiled) for label, policy in POLICIES.items()}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    held: dict[str, int] = {}
    for model in models.values():
        step(model, ids)  # compiles, and fills the allocator
    for _ in range(rounds):
        for label, model in models.items():
            taken, held[label] = step(model, ids)
            seconds[label].append(taken)
    base_time, base_held = statistics.median(seconds["none"]), held["none"]
    print(f"{name}, {rows} x {LENGTH} tokens, {'compiled' if compiled else 'eager'}\n")
    print("| recompute | held for backward | of none | forward + backward | of none |\n|---|---|---|---|---|")
    for label in models:
        middle = statistics.median(seconds[label])
        print(
            f"| {label} | {held[label] / 1e6:.0f} MB | {held[label] / base_held:.2f} |"
            f" {middle * 1000:.0f} ms | {middle / base_time:.2f} |"
        )


def count_block(name: str, tokens: int = 256) -> None:
    """Bytes that one block keeps, in bf16 weights and activations with the fused attention kernel."""
    config = replace(preset(name), num_layers=1)
    block = LlamaBlock(config, 0).to(torch.bfloat16)
    block.self_attn.attention_backend = "sdpa"
    cos, sin = rotary_tables(config.head_dim, torch.arange(tokens), config.rope_theta, config.rope_scaling)
    print(f"{name}: bytes per token, layer and unit of width ({config.hidden_size})\n")
    print("| recompute | bytes |\n|---|---|")
    for policy in ("none", "selective", "full"):
        apply_recompute(block, policy, blocks=[block])
        x = torch.zeros(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with ActivationMeter(block) as meter:
            out = block(x * 1.0, cos, sin)
        print(f"| {policy} | {meter.activations / tokens / config.hidden_size:.1f} |")
        del out
        remove_recompute([block])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-34m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", help="count the bytes of one block of this preset instead")
    given = parser.parse_args()
    tune_cpu_runtime()
    if given.block:
        count_block(given.block)
    else:
        compare(given.preset, given.rows, given.compiled, given.rounds)


if __name__ == "__main__":
    main()
