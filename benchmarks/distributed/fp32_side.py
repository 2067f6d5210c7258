"""The yardstick: the same training in fp32 in one process, in plain PyTorch, without either framework's engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alternate import take_turns
from workload import ADAMW, CLIP, LossModel, Workload, workload_from_arguments


def train(work: Workload, options: argparse.Namespace, step_done: Callable[[float], None]) -> None:
    import torch
    from safetensors.torch import save_file

    model = LossModel(work.model())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    step = 0
    try:
        while True:
            losses = []
            for rank in range(options.of_ranks):
                for batch in work.micro_batches(step, rank, options.of_ranks):
                    loss = model(**batch)
                    (loss / (options.of_ranks * work.accumulation)).backward()
                    losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            step_done(float(sum(losses)) / len(losses))
    finally:
        if options.weights:
            save_file({name: p.detach().clone() for name, p in model.decoder.named_parameters()}, options.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of-ranks", type=int, default=2, help="ranks whose rows this process takes")
    parser.add_argument("--weights", help="file for the final weights")
    work, options = workload_from_arguments(parser)
    take_turns(lambda step_done: train(work, options, step_done))


if __name__ == "__main__":
    main()
