"""Tokens per second of a mixture of experts on two ranks: experts divided, against the same global batch data-parallel.

    python benchmarks/distributed/expert_speed.py [--preset moe-60m] [--rows 8] [--length 256] [--steps 6]

Each rank has one core. Layouts take turns, so that what else the machine does meets all of them; medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from trainwright.comm import start
from trainwright.comm.layout import Layout
from trainwright.comm.mesh import make_mesh
from trainwright.models import build_model, preset
from trainwright.parallel import apply_zero
from trainwright.parallel.expert import apply_expert, expert_modules
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {"zero": 0, "shard": 1},
    "expert 2": {"zero": 0, "shard": 1, "expert": 2},
    "data 2, ZeRO-3": {"zero": 3, "shard": 2, "gather": "micro_batch"},
    "expert 2, ZeRO-3": {"zero": 3, "shard": 2, "expert": 2, "gather": "micro_batch"},
}


def measure(rank: int, world: int, options: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Median seconds of a step, and parameters of experts on this rank, of each layout."""
    ranks = start()
    made = {}
    for name, layout in LAYOUTS.items():
        model = build_model(preset(options["preset"]), seed=0).train()
        mesh = make_mesh(Layout(world=world, **layout), ranks)
        apply_expert(model, mesh.expert)
        experts = [module for _, module in expert_modules(model)]
        parallel = apply_zero(model, mesh, experts=experts)
        here = sum(getattr(p, "_local_tensor", p).numel() for module in experts for p in module.parameters())
        made[name] = (model, parallel, torch.optim.SGD(model.parameters(), lr=1e-3), here)
    rows, length = options["rows"] // world, options["length"]
    batch = torch.randint(0, 4000, (rows, length + 1), generator=torch.Generator().manual_seed(rank))
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for step in range(options["steps"] + 1):
        for name, (model, parallel, optimizer, _) in made.items():
            ranks.barrier()
            begin = time.perf_counter()
            loss = CausalLM().loss(model, {"input_ids": batch[:, :-1], "labels": batch[:, 1:]})
            parallel.begin_backward(last=True)
            (loss.loss_sum / loss.count).backward()
            parallel.end_backward(last=True)
            optimizer.step()
            optimizer.zero_grad()
            ranks.barrier()
            if step:
                seconds[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(seconds[name]), made[name][3]) for name in LAYOUTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="moe-60m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    options = vars(parser.parse_args())
    found = run_ranks(measure, 2, options, timeout=600)[0]
    first = next(iter(found.values()))[0]
    for name, (seconds, experts) in found.items():
        rate = options["rows"] * options["length"] / seconds
        print(f"{name:18} {rate:8.0f} tokens/s  {first / seconds:5.2f}x  {experts / 1e6:6.1f}M expert parameters here")


if __name__ == "__main__":
    main()
