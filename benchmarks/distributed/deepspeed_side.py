"""One rank of DeepSpeed's side. Started by `against_deepspeed.py`; needs deepspeed and trainwright.models.

Speaks the protocol of `benchmarks/alternate.py`: a number of steps on stdin, their seconds and losses on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alternate import take_turns
from profiled import profiled
from workload import ADAMW, CLIP, LossModel, Workload, workload_from_arguments


def engine_config(work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's JSON. Left at its defaults unless `--zero` says otherwise, except what a workload fixes."""
    optimizer: dict[str, Any] = {**ADAMW, "betas": list(ADAMW["betas"])}  # type: ignore[call-overload]
    if options.adam == "torch":
        optimizer["torch_adam"] = True
    zero: dict[str, Any] = {"stage": work.stage, **json.loads(options.zero)}
    if options.adam == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.accumulation,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "gradient_clipping": CLIP,
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_optimization": zero,
        "wall_clock_breakdown": options.breakdown,
        **json.loads(options.config),
    }


def train(work: Workload, options: argparse.Namespace, step_done: Callable[[float], None]) -> None:
    import deepspeed
    import torch

    if options.keep_memory:
        from trainwright.ops.cpu_runtime import tune_cpu_runtime

        tune_cpu_runtime()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = LossModel(work.model())
    if work.stage == 3:  # the head is used as a matrix, outside its own forward
        deepspeed.zero.register_external_parameter(model, model.decoder.head_weight)
    if options.compile != "none":
        model.compile_blocks(options.compile)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=engine_config(work, options)
    )
    step = 0
    try:
        with profiled(options.profile if rank == 0 else None):
            while True:
                losses = []
                for batch in work.micro_batches(step, rank, ranks):
                    loss = engine(**batch)
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())
                step += 1
                step_done(float(sum(losses)) / len(losses))
    finally:
        if options.weights:
            write_weights(engine.module.decoder, options.weights, rank)


def write_weights(decoder: Any, path: str, rank: int) -> None:
    """The fp32 weights that the optimizer holds, whole, from rank 0."""
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in decoder.named_parameters()}
    if rank == 0:
        save_file(weights, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--zero", default="{}", help="JSON merged into zero_optimization")
    parser.add_argument("--config", default="{}", help="JSON merged into the whole config")
    parser.add_argument("--adam", choices=["fused", "torch", "cpu"], default="fused")
    parser.add_argument("--compile", choices=["none", "call", "forward"], nargs="?", const="call", default="none")
    parser.add_argument("--keep-memory", action="store_true", help="Trainwright's setting of the C allocator")
    parser.add_argument("--breakdown", action="store_true", help="DeepSpeed's own timers, on stderr")
    parser.add_argument("--profile", help="file for rank 0's operator times")
    parser.add_argument("--weights", help="file for the final fp32 weights")
    work, options = workload_from_arguments(parser)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    take_turns(lambda step_done: train(work, options, step_done))


if __name__ == "__main__":
    main()
