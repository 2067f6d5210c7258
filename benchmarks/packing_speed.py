"""Trained tokens per second with best_fit packing against padding, on instruction text, in turns A B A B.

    python benchmarks/packing_speed.py ../shared/data/dolly_slice/dolly_first6400_instruction_response.jsonl

Both sides train the same model on the same documents with the same number of positions per step. A padded row holds one
document; a packed row is filled with whole documents that do not see each other. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alternate import STEPS_FOR_EVER, Contender, alternate, take_turns


def as_text(source: Path, target: Path) -> int:
    """Instruction and answer of every line as one document; returns how many."""
    count = 0
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            out.write(json.dumps({"text": f"{row['instruction']}\n\n{row['output']}"}, ensure_ascii=False) + "\n")
            count += 1
    return count


def trains(packing: str, source: Path, folder: Path, length: int, rows: int) -> Callable[..., None]:
    """A side that reports the trained tokens of every step."""

    def train(step_done: Callable[[float], None]) -> None:
        from trainwright.trainer import Callback, Trainer

        class Tick(Callback):
            name = "tick"

            def on_step_end(self, run: Any, report: Any) -> None:
                step_done(int(report.tokens))

        Trainer(
            {
                "model": {"preset": "llama-15m"},
                "data": {
                    "source": str(source),
                    "tokenizer": {"train": "bpe", "vocab_size": 8192},
                    "sequence_length": length,
                    "packing": packing,
                    "validation": "none",
                    "cache": str(folder / "cache"),
                },
                "train": {"steps": STEPS_FOR_EVER, "batch_tokens": rows * length, "micro_batch": rows, "compile": True},
                "optim": {"lr": 1e-3, "schedule": "constant"},
                "precision": "bf16",
                "checkpoint": {"every": "never"},
                "monitor": {"console": "quiet", "tensorboard": False},
                "run": {"dir": str(folder), "name": packing},
            },
            callbacks=[Tick()],
        ).fit()

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        documents_file = options.folder / "documents.jsonl"
        take_turns(trains(options.side, documents_file, options.folder, options.length, options.rows))
        return
    folder = Path(tempfile.mkdtemp())
    documents = as_text(options.source, folder / "documents.jsonl")
    shape = ["--folder", str(folder), "--length", str(options.length), "--rows", str(options.rows)]
    contenders = [Contender(name, [str(options.source), *shape]) for name in ("best_fit", "pad")]
    alternate(contenders, turns=options.turns, steps=options.steps, warmup=3)
    rates = {c.name: statistics.mean(c.values) / c.seconds() for c in contenders}
    print(f"\n{documents:,} documents, rows of {options.length}, {options.rows} rows a step\n")
    print("| packing | trained tokens per step | share of positions | s/step | trained tokens/s | against pad |")
    print("|---|---|---|---|---|---|")
    for contender in contenders:
        trained = statistics.mean(contender.values)
        print(
            f"| {contender.name} | {trained:,.0f} | {trained / (options.rows * options.length):.1%} |"
            f" {contender.seconds():.3f} | {rates[contender.name]:,.0f} | {rates[contender.name] / rates['pad']:.2f}x |"
        )


if __name__ == "__main__":
    main()
