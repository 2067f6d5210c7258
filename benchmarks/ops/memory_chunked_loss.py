"""Peak memory of a training step with the chunked loss against full logits, at vocabulary 32k and context 1024.

    python benchmarks/ops/memory_chunked_loss.py

Each variant runs in a process of its own: a llama-shaped decoder (4 layers, width 256) in bf16 autocast makes
training steps of `--rows` x 1024 tokens, and the peak resident size of the process is read from the kernel. What the
process held before its first step (libraries, weights) is reported apart and subtracted for the ratio of the step
itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

from trainwright.ops.activation import swiglu
from trainwright.ops.attention import attention
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.ops.norm import rms_norm
from trainwright.ops.rotary import apply_rotary, rotary_tables

WIDTH, HEADS, LAYERS, CONTEXT, VOCABULARY = 256, 4, 4, 1024, 32_000
MIB = 1 << 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.ModuleList(nn.Linear(WIDTH, 704, bias=False) for _ in range(2))
        self.down = nn.Linear(704, WIDTH, bias=False)
        self.norms = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        h = rms_norm(x, self.norms[0])
        q, k, v = (layer(h).view(rows, length, HEADS, WIDTH // HEADS) for layer in self.qkv)
        q, k = apply_rotary(q, k, cos, sin)
        x = x + self.out(attention(q, k, v).reshape(rows, length, WIDTH))
        h = rms_norm(x, self.norms[1])
        return x + self.down(swiglu(*(layer(h) for layer in self.gate_up)))


def train(variant: str, rows: int, steps: int) -> dict[str, float]:
    """Peak resident bytes of `steps` training steps, and the resident bytes before the first."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    blocks = nn.ModuleList(Block() for _ in range(LAYERS))
    optimizer = torch.optim.AdamW([*embedding.parameters(), *head.parameters(), *blocks.parameters()], fused=True)
    ids = torch.randint(0, VOCABULARY, (rows, CONTEXT))
    labels = torch.randint(0, VOCABULARY, (rows * CONTEXT,))
    cos, sin = rotary_tables(WIDTH // HEADS, CONTEXT)
    before = resident_bytes()
    loss = torch.zeros(())
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            x = embedding(ids)
            for block in blocks:
                x = block(x, cos, sin)
            flat = x.flatten(0, 1)
            if variant == "chunked":
                sums = linear_cross_entropy(flat, head.weight, labels)
                loss = sums.loss_sum / sums.count
            else:
                loss = nn.functional.cross_entropy(head(flat).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": peak, "loss": float(loss)}


def resident_bytes() -> int:
    """What the process holds now, from /proc (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="sequences of 1024 tokens in a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--variant", choices=["chunked", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(train(options.variant, options.rows, options.steps)))
        return
    results = {}
    for variant in ("full", "chunked"):
        command = [sys.executable, __file__, "--variant", variant]
        command += ["--rows", str(options.rows), "--steps", str(options.steps)]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        results[variant] = json.loads(finished.stdout.splitlines()[-1])
    full, chunked = results["full"], results["chunked"]
    print(f"vocabulary {VOCABULARY}, context {CONTEXT}, {options.rows} rows, {LAYERS} layers of width {WIDTH}, bf16\n")
    print("| loss | peak of the process | peak over what was held before | loss value |")
    print("|---|---|---|---|")
    for name, row in results.items():
        peak, step = row["peak"] / MIB, (row["peak"] - row["before"]) / MIB
        print(f"| {name} | {peak:.0f} MiB | {step:.0f} MiB | {row['loss']:.4f} |")
    whole = chunked["peak"] / full["peak"]
    step = (chunked["peak"] - chunked["before"]) / (full["peak"] - full["before"])
    print(f"| chunked / full | {whole:.2f} | {step:.2f} | |")


if __name__ == "__main__":
    main()
