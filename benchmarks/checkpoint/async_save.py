"""What a checkpoint of a 34M-parameter run costs training: asynchronous against synchronous, A B A B.

    python benchmarks/checkpoint/async_save.py [--folder DIR] [--rounds 4]

The state is that of the 34M llama under AdamW: parameters and both moments in fp32, about 400 MB. A training step is
imitated by bf16 matrix products with all threads, about as long as a real step on two cores. Per save it measures the
stall (how long `save` keeps the training thread), the time until the checkpoint is on the disk, and how much slower
steps are meanwhile.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainwright.base.events import Record, listening
from trainwright.checkpoint import Checkpointer, load_checkpoint, verify

HIDDEN, LAYERS, VOCABULARY, INTERMEDIATE = 512, 8, 8192, 1408


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama with 8 layers of width 512 and untied embeddings: 34.1M parameters."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_state() -> dict[str, Any]:
    shapes = list(parameter_shapes().items())
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(shape), "exp_avg_sq": torch.randn(shape).square()}
        for i, (_, shape) in enumerate(shapes)
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "params": list(range(len(shapes)))}]
    model = {name: torch.randn(shape) for name, shape in shapes}
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "data": {"index": 0}}


def train_step(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    for _ in range(12):
        torch.mm(left, right)
    return time.perf_counter() - started


def run(folder: Path, asynchronous: bool, state: dict[str, Any], steps: int) -> dict[str, float]:
    """One save in the middle of training; a save before it, which is not counted, warms buffers and disk."""
    left, right = torch.randn(2048, 1024).bfloat16(), torch.randn(1024, 2048).bfloat16()
    saved: list[Record] = []
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpointer(folder, keep=1, asynchronous=asynchronous) as checkpointer, listening(saved.append):
        started = time.perf_counter()
        checkpointer.prepare(state)
        prepare = time.perf_counter() - started
        checkpointer.save(0, state, required=True)
        quiet = [train_step(left, right) for _ in range(steps)]
        started = time.perf_counter()
        checkpointer.save(1, state)
        stall = time.perf_counter() - started
        busy = []
        while checkpointer.is_busy:
            busy.append(train_step(left, right))
        checkpointer.wait()
    median = statistics.median(quiet)
    return {
        "prepare_ms": 1e3 * prepare,
        "stall_ms": 1e3 * stall,
        "seconds": saved[-1]["seconds"],
        "bytes": saved[-1]["bytes"],
        "step_ms": 1e3 * median,
        # Time that training lost in all: the stall, and what its steps took longer while the writer worked.
        "lost_ms": 1e3 * (stall + sum(busy) - len(busy) * median),
        "during_percent": 100 * (sum(busy) / (len(busy) * median) - 1) if busy else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of A (synchronous) and B (asynchronous)")
    parser.add_argument("--steps", type=int, default=10, help="undisturbed steps per round, for the reference")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    state = make_state()
    count = sum(tensor.numel() for tensor in state["model"].values())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for round_number in range(arguments.rounds):
            for asynchronous in (False, True):
                result = run(Path(folder) / "checkpoints", asynchronous, state, arguments.steps)
                results[asynchronous].append(result)
                kind = "asynchronous" if asynchronous else "synchronous"
                print(
                    f"round {round_number} {kind}: " + " ".join(f"{k}={v:.4g}" for k, v in result.items()), flush=True
                )
        path = Path(folder) / "checkpoints" / "step-1"
        started = time.perf_counter()
        load_checkpoint(path, like=state)
        load_seconds = time.perf_counter() - started
        report = verify(path)
        assert report.ok
    size = results[True][0]["bytes"]
    print(
        f"\n{count / 1e6:.1f}M parameters, {size / 1e6:.0f} MB, {torch.get_num_threads()} threads, "
        f"medians of {arguments.rounds}:"
    )
    print(
        f"load with hashes {load_seconds:.2f} s ({size / load_seconds / 1e9:.2f} GB/s), verify {report.seconds:.2f} s"
    )
    print("| save | stall ms | until on disk s | GB/s | steps meanwhile | training time lost ms |")
    print("|---|---|---|---|---|---|")
    for asynchronous, name in ((False, "synchronous"), (True, "asynchronous")):
        m = {key: statistics.median(r[key] for r in results[asynchronous]) for key in results[asynchronous][0]}
        meanwhile = f"{m['during_percent']:+.1f}%" if asynchronous else "-"
        speed = m["bytes"] / m["seconds"] / 1e9
        print(f"| {name} | {m['stall_ms']:.0f} | {m['seconds']:.2f} | {speed:.2f} | {meanwhile} | {m['lost_ms']:.0f} |")


if __name__ == "__main__":
    main()
