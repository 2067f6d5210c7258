"""The share of a step in which pipeline ranks wait, measured beside its formula, for every schedule.

    OMP_NUM_THREADS=1 python benchmarks/distributed/pipeline_idle.py

Parts are equal, and the forward pass, the gradients of inputs and those of weights take equally long, as the formula
assumes: `matmul` parts are chains of square matrix products (2 ranks, one core each), `sleep` parts wait on the clock
(4 ranks, whatever the cores). Exits with 1 where a measurement is further than 10 points from the formula, or a
zero-bubble schedule waits longer than 1F1B.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.comm.mesh import Axis
from trainwright.parallel.pipeline import (
    Action,
    Part,
    PipelineRunner,
    Split,
    bubble_share,
    idle_share,
    parts_of_rank,
    write_chrome_trace,
)
from trainwright.parallel.pipeline.parts import Anatomy
from trainwright.parallel.pipeline.stack import StageBlocks
from trainwright.testing import run_ranks

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved_zb": 2, "zbv": 2, "dualpipev": 2}
MICRO_BATCHES, STEPS, WARMUP = 8, 5, 2
WIDTH, ROWS = 768, 768
MATRICES = 12
"""Products of WIDTH x WIDTH with ROWS rows on a rank: divided by the parts on it, so that all schedules work alike."""
UNIT = 0.012
"""Seconds of a third of a rank's work on a micro-batch in `sleep` parts; some 100 times what starting a process's
next action takes."""


class _Slept(torch.autograd.Function):
    """The same tensor; forward and backward take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: float, after: float) -> Tensor:
        ctx.after = after
        time.sleep(before)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.after)
        return grad, None, None


class SleepingBlock(nn.Module):
    """y = x * w, where y takes `unit` seconds, and so does the gradient of x, and that of w."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = _Slept.apply(self.weight, 0.0, self.unit)
        return _Slept.apply(x, self.unit, self.unit) * weight


class MatrixBlock(nn.Module):
    """A chain of square products: as much work for the output as for each of the two gradients."""

    def __init__(self, matrices: int) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)))

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


class Bare(nn.Module):
    """Blocks and nothing else: what a runner needs of a model."""

    def __init__(self, kind: str, schedule: str, rank: int, ranks: int) -> None:
        super().__init__()
        virtual = SCHEDULES[schedule]
        count = ranks * virtual
        parts = tuple(Part(index, (index,), count) for index in range(count))
        local = tuple(parts[index] for index in parts_of_rank(schedule, ranks, virtual, rank))
        unit, matrices = UNIT / virtual, MATRICES // virtual
        blocks = {str(part.index): SleepingBlock(unit) if kind == "sleep" else MatrixBlock(matrices) for part in local}
        self.layers = StageBlocks(blocks)
        self.start = nn.Parameter(torch.ones(WIDTH))
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.pipeline_split = Split(rank, ranks, schedule, virtual, parts, local, Anatomy("layers", (), (), "", ()))

    def run_stage(self, x: Tensor | None, batch: Mapping[str, Tensor], part: Part) -> Tensor:
        """The block of one part."""
        if x is None:
            x = self.start.expand(*batch["input_ids"].shape, WIDTH)
        return self.layers[str(part.index)](x)

    def hidden_states(self, *_: Any) -> Tensor:
        """Given by the runner while the loss is computed."""
        raise AssertionError


def loss(model: Any, batch: Mapping[str, Tensor]) -> Any:
    hidden = model.hidden_states(batch["input_ids"])
    return SimpleNamespace(loss_sum=hidden.mean(), count=torch.tensor(1))


def measure(rank: int, ranks: int, kind: str, schedules: list[str]) -> list[list[list[tuple[Any, ...]]]]:
    """By schedule and step, the actions of this rank."""
    length = ROWS if kind == "matmul" else 1
    batch = {"input_ids": torch.zeros(MICRO_BATCHES, length, dtype=torch.int64)}
    axis = Axis("pipeline", rank, ranks, dist.group.WORLD)
    found = []
    for schedule in schedules:
        runner = PipelineRunner(Bare(kind, schedule, rank, ranks), axis, device=torch.device("cpu"))
        steps = []
        for _ in range(WARMUP + STEPS):
            dist.barrier()
            runner.forward_backward(loss, batch, micro_batches=MICRO_BATCHES)
            steps.append([tuple(action) for action in runner.actions])
        found.append(steps[WARMUP:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["matmul", "sleep", "both"], default="both")
    parser.add_argument("--traces", type=Path, help="a folder for one Chrome trace of each schedule")
    options = parser.parse_args()
    missed = []
    print("| parts | ranks | schedule | parts a rank | waits, measured | formula | step, ms |")
    print("|---|---|---|---|---|---|---|")
    for kind, ranks in (("matmul", 2), ("sleep", 4)):
        if options.kind not in (kind, "both"):
            continue
        results = run_ranks(measure, ranks, kind, list(SCHEDULES), timeout=300)
        shares: dict[str, float] = {}
        for index, (schedule, virtual) in enumerate(SCHEDULES.items()):
            steps = [[Action(*a) for rank in results for a in rank[index][step]] for step in range(STEPS)]
            shares[schedule] = statistics.median(statistics.mean(idle_share(step).values()) for step in steps)
            seconds = statistics.median(max(a.end for a in step) - min(a.start for a in step) for step in steps)
            formula = bubble_share(schedule, ranks, MICRO_BATCHES, virtual)
            cells = f"{shares[schedule]:.1%} | {formula:.1%} | {seconds * 1e3:.0f}"
            print(f"| {kind} | {ranks} | {schedule} | {virtual} | {cells} |", flush=True)
            if abs(shares[schedule] - formula) > 0.1:
                missed.append(f"{kind} {schedule}: {shares[schedule]:.1%} is not within 10 points of {formula:.1%}")
            if options.traces is not None:
                options.traces.mkdir(parents=True, exist_ok=True)
                write_chrome_trace(steps[-1], options.traces / f"{kind}-{schedule}.json")
        for schedule in ("interleaved_zb", "zbv", "dualpipev"):
            if shares[schedule] >= shares["1f1b"]:
                missed.append(f"{kind} {schedule} waits {shares[schedule]:.1%}, 1f1b {shares['1f1b']:.1%}")
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
