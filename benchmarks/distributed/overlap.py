"""How much of the communication runs beside computation, read from a trace of one training step on two gloo ranks.

    python benchmarks/distributed/overlap.py [--stage 3] [--prefetch 1] [--trace folder]

The trace (chrome://tracing, Perfetto) shows gloo's collectives on their own rows, under the blocks whose forward and
backward passes they overlap. Printed: seconds in collectives, and the share of them during which the training thread
computed instead of waiting.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from trainwright.comm import start
from trainwright.engine.initialize import initialize
from trainwright.models import build_model, preset
from trainwright.ops.linear_cross_entropy import linear_cross_entropy
from trainwright.testing import run_ranks

ROWS, LENGTH = 4, 512


def step(engine: Any) -> None:
    rows = torch.randint(0, 4096, (ROWS, LENGTH + 1))
    with engine.autocast():
        hidden = engine.model.hidden_states(rows[:, :-1])
        sums = linear_cross_entropy(hidden.flatten(0, 1), engine.model.head_weight, rows[:, 1:].flatten())
    engine.backward(sums)
    engine.step()


def traced(rank: int, world: int, stage: int, prefetch: int, overlap: int, folder: str | None) -> dict[str, float]:
    model = build_model(preset("llama-34m", vocab_size=4096), seed=0)
    config = {
        "batch": {"micro": ROWS},
        "optim": {"name": "adamw", "lr": 1e-4},
        "precision": "bf16",
        "parallel": {"zero": stage, **({"prefetch": prefetch} if stage else {})},
    }
    engine = initialize(model=model, config=config, ranks=start()).engine
    for part in (engine.data_parallel, getattr(engine.data_parallel, "_rest", None)):
        if part is not None:
            part._sums.depth = overlap
    for _ in range(2):
        step(engine)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(engine)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(Path(folder) / f"rank-{rank}.json"))
    return shares(profile.events())


def shares(events: Any) -> dict[str, float]:
    """Seconds of collectives, and of the time in them during which the training thread did not wait for them."""
    collectives = [e.time_range for e in events if e.name.startswith("gloo:")]
    main = max({e.thread for e in events}, key=lambda thread: sum(e.thread == thread for e in events))
    computing = [
        e.time_range
        for e in events
        if e.thread == main and e.name.startswith("aten::") and "wait" not in e.name and not e.cpu_children
    ]
    busy, total = union(computing), union(collectives)
    return {"seconds": length(total) / 1e6, "beside": length(intersection(busy, total)) / max(length(total), 1)}


def union(ranges: list[Any]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((r.start, r.end) for r in ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def intersection(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(ranges: list[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in ranges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="folder for the traces")
    arguments = parser.parse_args()
    print("| stage | overlap | seconds in collectives | of these beside computation |")
    print("|---|---|---|---|")
    for stage in (0, 1, 2, 3):
        for word, prefetch, overlap in (("on (default)", 1, 2), ("off", 0, 0)):
            folder = f"{arguments.trace}/stage-{stage}-{word.split()[0]}" if arguments.trace else None
            result = run_ranks(traced, 2, stage, prefetch, overlap, folder, timeout=180)[0]
            print(f"| {stage} | {word} | {result['seconds']:.2f} | {result['beside']:.0%} |", flush=True)


if __name__ == "__main__":
    main()
