"""Tokens per second of one global batch on two ranks, by the axis over which they divide the work.

    python benchmarks/distributed/axes.py                     # all axes, in turns within one pair of processes
    python benchmarks/distributed/axes.py --only tensor,ring  # some of them; data parallelism is always the reference

Every layout trains the same llama on the same rows in bf16 with AdamW and clipping; each rank is a process with one
thread. All engines live in the same two processes and take one step each in turn, so that a disturbance meets all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

PRESET = "llama-34m"
AXES: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor": 2},
    "ring": {"context": 2},
    "heads": {"context": 2, "ulysses": 2},
    "1f1b": {"stages": 2, "schedule": "1f1b"},
    "zbv": {"stages": 2, "schedule": "zbv", "virtual": 2},
}


def layout_of(name: str) -> Any:
    """The layout on two ranks; whoever does not divide the model shards optimizer state over both."""
    from trainwright.comm.mesh import Layout, PipelineLayout

    values = dict(AXES[name])
    pipeline = PipelineLayout(values.pop("stages", 1), values.pop("schedule", "1f1b"), values.pop("virtual", 1))
    whole = "tensor" not in values and pipeline.stages == 1
    return Layout(2, 1 if whole else 0, 2 if whole else 1, pipeline=pipeline, **values)


def build(name: str, options: argparse.Namespace, ranks: Any) -> Any:
    """An engine under one layout, and how many micro-batches it takes for a step."""
    from trainwright.comm.mesh import make_mesh
    from trainwright.config import CommSection, MemorySection, ParallelSection
    from trainwright.config.precision_section import BF16Precision
    from trainwright.engine import Engine, precision
    from trainwright.engine.divide import Sections, divide
    from trainwright.engine.materialise import materialise
    from trainwright.engine.names import optimized_parameters
    from trainwright.models import build_model, preset
    from trainwright.models.initialise import initial_values
    from trainwright.optim import OptimizerOptions, build_optimizer

    config = preset(PRESET, vocab_size=8192, max_position_embeddings=options.length)
    mesh = make_mesh(layout_of(name), ranks)
    sections = Sections(BF16Precision(name="bf16"), ParallelSection(), CommSection(), MemorySection())
    model = build_model(config, device="meta")
    divided = divide(model, mesh, precision("bf16"), sections, compiled=not options.eager)
    materialise(model, ranks.device, initial_values(config, 0))
    return Engine(
        model,
        build_optimizer(optimized_parameters(model), OptimizerOptions(lr=1e-3)),
        multiplier=lambda step: 1.0,
        precision=precision("bf16"),
        data_parallel=divided.data_parallel,
        accumulation=options.rows // mesh.rows[1] // options.micro,
        clip_norm=1.0,
        schedule=divided.schedule,
        cut=divided.cut,
    )


def measure(rank: int, world: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every timed step, by layout."""
    import torch

    from trainwright.comm import start
    from trainwright.tasks import CausalLM

    torch.set_num_threads(1)
    ranks = start()
    engines = {name: build(name, options, ranks) for name in options.only}
    task = CausalLM(compiled=not options.eager)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    generator = torch.Generator().manual_seed(0)
    for turn in range(options.warmup + options.turns):
        ids = torch.randint(8192, (options.rows, options.length + 1), generator=generator)
        for name, engine in engines.items():
            place, places = engine.data_parallel.mesh.rows
            own = ids.chunk(places)[place]
            batch = {"input_ids": own[:, :-1].contiguous(), "labels": own[:, 1:].contiguous()}
            ranks.barrier()
            began = time.perf_counter()
            engine.forward_backward(task.loss, batch, micro_rows=options.micro)
            engine.step()
            ranks.barrier()
            if turn >= options.warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(AXES), help="layouts to measure, separated by commas")
    parser.add_argument("--rows", type=int, default=16, help="rows of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each layout")
    parser.add_argument("--warmup", type=int, default=2, help="steps before; the first compiles")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    options.only = list(dict.fromkeys(["data", *options.only.split(",")]))

    from trainwright.testing import run_ranks

    seconds = run_ranks(measure, 2, options, timeout=3600)[0]
    tokens = options.rows * options.length
    reference = statistics.median(seconds["data"])
    print(f"{PRESET}, {options.rows} rows of {options.length} tokens, micro-batches of {options.micro}, 2 ranks")
    print("| layout | tokens/s | beside data parallel | spread of turns |")
    print("|---|---|---|---|")
    for name, turns in seconds.items():
        middle = statistics.median(turns)
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds["data"], turns, strict=True))
        print(
            f"| {layout_of(name).describe()} | {tokens / middle:,.0f} | {reference / middle:.2f}x"
            f" | {ratios[0]:.2f}-{ratios[-1]:.2f} |"
        )


if __name__ == "__main__":
    main()
