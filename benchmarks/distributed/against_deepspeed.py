"""Trainwright against DeepSpeed on CPU: speed in turns A B A B, bytes on the wire, closeness of bf16 to fp32.

    python benchmarks/distributed/against_deepspeed.py --deepspeed-python PATH/bin/python          # all three tables
    python benchmarks/distributed/against_deepspeed.py                                             # our side alone
    python benchmarks/distributed/against_deepspeed.py speed --stages 2 --accumulations 1 ...      # a part of it

DeepSpeed lives in an environment of its own, which needs deepspeed and this package. Both sides train the same llama
(`workload.py`) on the same rows, in bf16, each rank a process with one thread, AdamW, clipping at 1.0. The bytes are
those of the interface `lo`, in a network namespace of our own where the system allows that (root, Linux); elsewhere
nothing else may use `lo` meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from closeness import Closeness, closeness, fp32_run
from rank_set import RankSet, alternate, enter_own_network
from workload import Workload

HERE = Path(__file__).resolve().parent
OURS, THEIRS = "trainwright", "deepspeed"
WARMUP = 2
DISTURBED = 0.1
"""Processors kept busy by others from which a speed is not to be trusted."""


@dataclass(frozen=True)
class Case:
    """One row of a table: a workload and the contenders' commands."""

    work: Workload
    options: argparse.Namespace

    def sides(self, *, weights: Path | None = None) -> list[RankSet]:
        """Fresh rank sets, ours first."""
        options = self.options
        extra = {OURS: options.trainwright_options, THEIRS: options.deepspeed_options}
        pythons = {OURS: sys.executable, THEIRS: options.deepspeed_python}
        sides = []
        for name, python in pythons.items():
            if python is None:
                continue
            command = [python, str(HERE / f"{name}_side.py"), *self.work.arguments(), *shlex.split(extra[name])]
            if weights is not None:
                command += ["--weights", str(weights / name)]
            sides.append(RankSet(name, command, options.ranks))
        return sides


@dataclass(frozen=True)
class SpeedRow:
    """One side's share of a row of the speed table."""

    seconds: float
    spread: tuple[float, float]
    psi: float
    peak: int
    disturbance: float


def measure_speed(case: Case) -> dict[str, SpeedRow]:
    """Both sides in turns."""
    options, parameters = case.options, case.work.parameters()
    sides = case.sides()
    try:
        alternate(sides, turns=options.turns, steps=options.steps, warmup=WARMUP)
    finally:
        for side in sides:
            side.stop()
    return {
        side.name: SpeedRow(
            side.seconds(),
            side.spread(),
            side.psi(options.steps, parameters),
            side.peak,
            max(side.disturbances[1:]),  # the first is the warm-up, whose compilers are our own
        )
        for side in sides
    }


def measure_bytes(case: Case, steps: int = 3) -> dict[str, float]:
    """Psi a step of each side; the first steps, which trace and build, are not counted."""
    psi = {}
    for side in case.sides():
        try:
            side.start()
            side.turn(WARMUP)
            side.turn(steps)
            psi[side.name] = side.psi(steps, case.work.parameters())
        finally:
            side.stop()
    return psi


def measure_closeness(case: Case, steps: int) -> dict[str, Closeness]:
    """Each side after `steps` steps in bf16 beside plain PyTorch in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        reference = fp32_run(case.work, case.options.ranks, steps, Path(folder) / "fp32")
        result = {}
        for side in case.sides(weights=Path(folder)):
            try:
                side.start()
                side.turn(steps)
                side.finish()
            finally:
                side.stop()
            result[side.name] = closeness(side.losses, Path(folder) / side.name, reference, case.work)
        return result


def speed_table(cases: list[Case]) -> list[str]:
    lines = [
        "| stage | accumulation x rows | side | s/step (fastest-slowest turn) | tokens/s | Psi a step |"
        " peak MiB per rank | trainwright is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rows = measure_speed(case)
        for name, row in rows.items():
            rate = case.work.tokens_per_step(case.options.ranks) / row.seconds
            ratio = row.seconds / rows[OURS].seconds
            low, high = row.spread
            lines.append(
                f"| {case.work.stage} | {case.work.accumulation} x {case.work.micro} | {name} |"
                f" {row.seconds:.3f} ({low:.3f}-{high:.3f}) |"
                f" {rate:,.0f} | {row.psi:.2f} | {row.peak >> 20:,} | {ratio:.2f}x |"
            )
            print(lines[-1], flush=True)
            if row.disturbance > DISTURBED:
                lines.append(f"other programs kept {row.disturbance:.2f} processors busy meanwhile: measure that again")
                print(lines[-1], flush=True)
    return lines


def bytes_table(cases: list[Case], sides: list[str]) -> list[str]:
    lines = [f"| stage | accumulation | {' | '.join(sides)} |", "|---|---|" + "---|" * len(sides)]
    for case in cases:
        psi = measure_bytes(case)
        cells = " | ".join(f"{psi[name]:.2f} Psi" for name in sides)
        lines.append(f"| {case.work.stage} | {case.work.accumulation} | {cells} |")
        print(lines[-1], flush=True)
    return lines


def closeness_table(cases: list[Case], steps: int) -> list[str]:
    lines = [
        "| stage | accumulation | side | loss: largest relative distance | mean | weights: distance / way gone |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        for name, row in measure_closeness(case, steps).items():
            lines.append(
                f"| {case.work.stage} | {case.work.accumulation} | {name} | {row.largest_loss:.1e} |"
                f" {row.mean_loss:.1e} | {row.weights:.4f} |"
            )
            print(lines[-1], flush=True)
    return lines


def deepspeed_version(python: str | None) -> str | None:
    """The version that this interpreter can import; None without one."""
    if python is None:
        return None
    code = "import importlib.metadata as m; print(m.version('deepspeed'))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def machine() -> str:
    """What the tables were measured on, in one line."""
    import torch

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    return f"{os.cpu_count()} logical cores of {cpu}, torch {torch.__version__}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="what", help="speed, bytes, closeness; default all")
    parser.add_argument("--deepspeed-python", help="interpreter of an environment with deepspeed and trainwright")
    parser.add_argument("--deepspeed-options", default="--compile", help="options of deepspeed_side.py, one string")
    parser.add_argument("--trainwright-options", default="", help="options of trainwright_side.py, one string")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--accumulations", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn; the first of each is not timed")
    parser.add_argument("--micro", type=int, default=4, help="rows of a micro-batch per rank, of the speed table")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a row, of the speed table")
    parser.add_argument("--closeness-steps", type=int, default=20)
    options = parser.parse_args()
    unknown = set(options.what) - {"speed", "bytes", "closeness"}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of speed, bytes, closeness")
    return options


def main() -> None:
    options = parse()
    what = options.what or ["bytes", "closeness", "speed"]
    version = deepspeed_version(options.deepspeed_python)
    if version is None:
        options.deepspeed_python = None
        print("no deepspeed: give --deepspeed-python an interpreter that has it; only our side runs\n")
    sides = [OURS, THEIRS] if version else [OURS]
    own = enter_own_network()
    print(f"{machine()}, deepspeed {version or 'absent'}, {options.ranks} gloo ranks of one thread, bf16")
    print(f"bytes counted on lo {'of a network namespace of our own' if own else 'of the host: keep others off it'}")
    print(f"$ python {' '.join(map(shlex.quote, sys.argv))}\n", flush=True)

    small = Workload("6m", sequence=128, micro=4)
    large = Workload("34m", sequence=options.sequence, micro=options.micro)
    layouts = list(itertools.product(options.stages, options.accumulations))
    cases = {
        size: [Case(replace(size, stage=stage, accumulation=k), options) for stage, k in layouts]
        for size in (small, large)
    }
    tables: dict[str, list[str]] = {}
    if "bytes" in what:
        tables[f"Bytes on the wire, {small.parameters():,} parameters"] = bytes_table(cases[small], sides)
    if "closeness" in what:
        title = f"bf16 beside fp32, {small.parameters():,} parameters, {options.closeness_steps} steps"
        tables[title] = closeness_table(cases[small], options.closeness_steps)
    if "speed" in what:
        tables[f"Speed, {large.parameters():,} parameters"] = speed_table(cases[large])
    for title, lines in tables.items():
        print(f"\n{title}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
