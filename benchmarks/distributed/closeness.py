"""How far a bf16 run is from the fp32 run of the same training, in its losses and in its weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rank_set import RankSet
from workload import Workload

__all__ = ["Closeness", "Reference", "closeness", "fp32_run"]


@dataclass(frozen=True)
class Reference:
    """Losses and final weights (a safetensors file) of the fp32 run."""

    losses: list[float]
    weights: Path


@dataclass(frozen=True)
class Closeness:
    """largest_loss, mean_loss: |loss - fp32 loss| / fp32 loss over the steps. weights: distance of the final weights to
    the fp32 run's, divided by the distance that those have gone from the start (both L2, all parameters)."""

    largest_loss: float
    mean_loss: float
    weights: float


def fp32_run(work: Workload, ranks: int, steps: int, weights: Path) -> Reference:
    """Train in fp32 in one process on the rows of all `ranks`."""
    script = str(Path(__file__).with_name("fp32_side.py"))
    command = [sys.executable, script, "--of-ranks", str(ranks), *work.arguments(), "--weights", str(weights)]
    run = RankSet("fp32", command, 1)
    try:
        run.start()
        run.turn(steps)
        run.finish()
    finally:
        run.stop()
    return Reference(run.losses, weights)


def closeness(losses: list[float], weights: Path, reference: Reference, work: Workload) -> Closeness:
    """Compare a run with the reference; both started from `work.model()`."""
    from safetensors.torch import load_file

    distances = [abs(a - b) / b for a, b in zip(losses, reference.losses, strict=True)]
    start = {name: p.detach() for name, p in work.model().named_parameters()}
    mine, theirs = load_file(weights), load_file(reference.weights)
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"the runs hold different parameters: {sorted(mine.keys() ^ theirs.keys())}")
    apart = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    gone = sum(float((theirs[name].double() - start[name].double()).square().sum()) for name in theirs)
    return Closeness(max(distances), sum(distances) / len(distances), (apart / gone) ** 0.5)
