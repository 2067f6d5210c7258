"""Optimizer state on disk against state in memory: resident memory, step time, and that the results are the same.

    python benchmarks/memory/nvme_state.py /path/on/a/disk [--parameters 100] [--rounds 3]
    python benchmarks/memory/nvme_state.py /path/on/a/disk --training      # whole steps of llama-34m, 4 x 512 tokens

Each side runs in processes of its own (A B A B ...), so that resident memory is its own. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from trainwright.base.device import memory_bytes
from trainwright.memory import MappedState
from trainwright.models import build_model, preset
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.optim import OptimizerOptions, build_optimizer

STEPS = 6
WIDTH = 1024


def parameters(millions: int) -> nn.ParameterDict:
    """A fifth of the numbers in one embedding, the rest in matrices and vectors as a transformer has them."""
    generator = torch.Generator().manual_seed(1)
    rows = millions * 200_000 // WIDTH
    shapes = {"embed_tokens": (rows, WIDTH)}
    left = millions * 1_000_000 - rows * WIDTH
    for layer in range(left // (12 * WIDTH * WIDTH)):
        shapes |= {f"in_{layer}": (4 * WIDTH, WIDTH), f"out_{layer}": (WIDTH, 4 * WIDTH)}
        shapes |= {f"attention_{layer}": (4 * WIDTH, WIDTH), f"norm_{layer}": (WIDTH,)}
    return nn.ParameterDict({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()})


def measure(folder: str | None, millions: int) -> dict[str, float | str]:
    """One side: what the state adds to resident memory, and the time of a step."""
    model = parameters(millions)
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(name="adamw", lr=1e-3))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = memory_bytes()
    placed = MappedState(optimizer, folder) if folder is not None else None
    seconds = []
    highest = 0
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.step(gradient_factor=torch.tensor(0.5))
        seconds.append(time.perf_counter() - start)
        highest = max(highest, memory_bytes())
        time.sleep(0.5)  # a training step computes here: what is read ahead for the next one arrives
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    state = sum(p.numel() for p in model.parameters()) * 8
    for name, values in sorted(optimizer.state_dict()["parameters"].items()):
        for key, tensor in sorted(values.items()):
            digest.update(f"{name}.{key}".encode() + tensor.numpy().tobytes())
    return {
        "state": state,
        "resident": highest - before,
        "step": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "first": seconds[0],
        "direct": str(placed.file.direct) if placed is not None else "-",
        "digest": digest.hexdigest(),
    }


def training(folder: str, rounds: int) -> None:
    """Whole training steps in turns: the next step's first reads are hidden behind forward and backward."""
    sides = {"memory": _Training(None), "disk": _Training(folder)}
    for side in sides.values():
        side.step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.step())
    equal = all(
        torch.equal(a, b)
        for a, b in zip(sides["memory"].model.parameters(), sides["disk"].model.parameters(), strict=True)
    )
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(f"{name}: {middle[name] * 1000:.0f} ms a step ({', '.join(f'{s * 1000:.0f}' for s in sorted(found))})")
    print(f"ratio {middle['disk'] / middle['memory']:.2f}; weights {'bitwise equal' if equal else 'DIFFER'}")


class _Training:
    def __init__(self, folder: str | None) -> None:
        self.model = build_model(preset("llama-34m"), seed=1).train()
        self.optimizer = build_optimizer(self.model.named_parameters(), OptimizerOptions(name="adamw", lr=1e-3))
        self.placed = MappedState(self.optimizer, folder) if folder is not None else None
        self.ids = torch.randint(0, 8192, (4, 512), generator=torch.Generator().manual_seed(3))

    def step(self) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.hidden_states(self.ids).flatten(0, 1)
            loss = linear_cross_entropy(hidden, self.model.head_weight, self.ids.flatten()).loss_sum
        loss.backward()
        self.optimizer.step(gradient_factor=1 / self.ids.numel())
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--side", choices=("memory", "disk"))
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.folder if given.side == "disk" else None, given.parameters)))
        return
    if given.training:
        training(given.folder, given.rounds)
        return
    rows: dict[str, list[dict[str, float | str]]] = {"memory": [], "disk": []}
    for _ in range(given.rounds):
        for side, found in rows.items():
            command = [sys.executable, __file__, given.folder, "--parameters", str(given.parameters), "--side", side]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    digests = {row["digest"] for found in rows.values() for row in found}
    print("| state in | bytes of state | resident memory it adds | AdamW step | all steps |\n|---|---|---|---|---|")
    middle = {}
    for side, found in rows.items():
        steps = sorted(float(row["step"]) for row in found)
        resident = sorted(float(row["resident"]) for row in found)
        middle[side] = (resident[len(resident) // 2], steps[len(steps) // 2])
        shown = ", ".join(f"{step * 1000:.0f}" for step in steps)
        state = float(found[0]["state"]) / 1e6
        print(
            f"| {side} | {state:.0f} MB | {middle[side][0] / 1e6:.0f} MB | {middle[side][1] * 1000:.0f} ms | {shown} |"
        )
    saved = (middle["memory"][0] - middle["disk"][0]) / float(rows["disk"][0]["state"])
    ratio = middle["disk"][1] / middle["memory"][1]
    print(f"\nresident memory down by {saved:.1%} of the state's bytes; step {ratio:.1f}x")
    print(f"results {'bitwise equal' if len(digests) == 1 else 'DIFFER'}; O_DIRECT: {rows['disk'][0]['direct']}")


if __name__ == "__main__":
    main()
