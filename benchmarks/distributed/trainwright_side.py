"""One rank of Trainwright's side. Started by `against_deepspeed.py`.

Speaks the protocol of `benchmarks/alternate.py`: a number of steps on stdin, their seconds and losses on stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alternate import take_turns
from profiled import profiled
from workload import ADAMW, CLIP, LossModel, Workload, workload_from_arguments


def engine_config(work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Trainwright's own language; what is not here is decided by the engine."""
    return {
        "batch": {"micro": work.micro, "accumulation": work.accumulation},
        "optim": {"name": "adamw", **ADAMW, "clip_norm": CLIP},
        "precision": options.precision,
        "parallel": {"zero": work.stage, "gather": options.gather},
    }


def train(work: Workload, options: argparse.Namespace, step_done: Callable[[float], None]) -> None:
    import torch

    import trainwright
    from trainwright.comm import start, stop
    from trainwright.engine import compile_blocks
    from trainwright.ops.cpu_runtime import tune_cpu_runtime
    from trainwright.tasks import CausalLM

    tune_cpu_runtime()
    torch.set_num_threads(1)
    ranks = start(device="cpu")
    decoder = work.model()
    model = decoder if options.bare else LossModel(decoder)
    engine = trainwright.initialize(model=model, config=engine_config(work, options), ranks=ranks).engine
    if options.compile:
        compile_blocks(decoder)
    task = CausalLM(compiled=True)
    step = 0
    try:
        with profiled(options.profile if ranks.rank == 0 else None):
            while True:
                losses = []
                for batch in work.micro_batches(step, ranks.rank, ranks.world):
                    if options.bare:
                        with engine.autocast():
                            output = task.loss(decoder, batch)
                        engine.backward(output)
                        losses.append(output.loss_sum.detach() / output.count)
                    else:
                        loss = engine(**batch)
                        engine.backward(loss)
                        losses.append(loss.detach())
                    engine.step()
                step += 1
                step_done(float(sum(losses)) / len(losses))
    finally:
        if options.weights:
            write_weights(decoder, options.weights, first=ranks.rank == 0)
        engine.destroy()
        stop()


def write_weights(decoder: Any, path: str, *, first: bool) -> None:
    """The fp32 weights, whole, from rank 0; all ranks call it."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    weights = {
        name: p.full_tensor().detach().clone() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in decoder.named_parameters()
    }
    if first:
        save_file(weights, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--gather", choices=["auto", "step", "micro_batch"], default="auto")
    parser.add_argument("--bare", action="store_true", help="the decoder without a wrapper: residual stream in fp32")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the blocks uncompiled")
    parser.add_argument("--profile", help="file for rank 0's operator times")
    parser.add_argument("--weights", help="file for the final fp32 weights")
    work, options = workload_from_arguments(parser)
    take_turns(lambda step_done: train(work, options, step_done))


if __name__ == "__main__":
    main()
