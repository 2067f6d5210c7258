"""Fine-tuning on chats: trained tokens per second against TRL's SFTTrainer, in turns A B A B.

    python benchmarks/sft_speed.py ../shared/data/dolly_slice/dolly_first6400_instruction_response.jsonl \\
        --trl-python PATH/bin/python

PATH is an environment with trl (`pip install 'trl>=1.16'`, which brings transformers, accelerate and datasets); without
`--trl-python` it is this one. The text is a jsonl file with `instruction` and `output`. The table comes last.

Both sides start from the same random weights (llama-34m as a Hugging Face folder), read the same chats through the same
template with the same tokenizer, train what the assistant writes and the end of its turn, pack whole chats into rows of
512 tokens, and take optimizer steps over 32 rows (16,384 tokens) in bf16 autocast over fp32 weights: fused AdamW,
betas 0.9 and 0.95, no weight decay, clipping at 1.0. Chats that do not fit into a row are left out for both.

- Ours is `Trainer.fit` on a recipe that leaves compilation and micro-batch to the planner.
- TRL's is `SFTTrainer` with packing (`bfd`: best fit, decreasing), `assistant_only_loss`, sdpa attention, no gradient
  checkpointing, no logging. Micro-batches of several sizes, eager and compiled, are tried first on steps of 8 rows; the
  fastest takes the turns. Where it compiles, micro-batches are padded to one length (`pad_to_multiple_of`), without
  which each would have a shape of its own.

Isolation: TRL lays the rows of a micro-batch end to end (padding-free), with positions that begin anew in every chat.
From these transformers makes a dense mask [1, 1, tokens, tokens] for sdpa, so on a CPU too a chat sees itself alone, as
with us. `--wrapped` adds TRL's other packing as a third side, which cuts chats at the ends of rows and lets them see
what stands before them: less work, and another task.

First of all TRL trains on the very rows of our first steps, in their order. The benchmark ends with an error unless
both have the same trained tokens and, within the noise of bf16, the same losses.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from alternate import Contender, alternate, take_turns
from sft_sides import CHECKED, LENGTH, Variant, prepare, train_ours, train_trl

STEP_ROWS, TRIED_ROWS, WARMUP = 32, 8, 2
OURS, SAME_ROWS = "trainwright", "TRL on our rows"
CLOSE = 0.005
"""Nats by which losses on the same rows may differ: bf16 rounds products and logits (0.4 %) in another order."""
ISOLATED = (Variant(1, False), Variant(2, False), Variant(4, False), Variant(1, True), Variant(4, True))
WRAPPED = (Variant(8, False, "wrapped"), Variant(8, True, "wrapped"))


def our_side(options: argparse.Namespace, folder: Path, step_rows: int) -> Contender:
    return Contender(OURS, [str(options.source), "--folder", str(folder), "--step-rows", str(step_rows)])


def trl_side(
    options: argparse.Namespace, folder: Path, step_rows: int, variant: Variant, name: str | None = None
) -> Contender:
    arguments = ["--folder", str(folder), "--step-rows", str(step_rows), *variant.arguments()]
    return Contender(name or str(variant), [str(options.source), *arguments], options.trl_python)


def check_same_job(options: argparse.Namespace, folder: Path) -> None:
    """Exit with an error unless TRL, on the rows of our first steps, has our losses and our trained tokens."""
    rows = min(TRIED_ROWS, options.rows)
    ours = our_side(options, folder, rows)
    theirs = trl_side(options, folder, rows, Variant(1, False), SAME_ROWS)
    for side in (ours, theirs):  # one after the other: ours writes down the rows
        alternate([side], turns=0, steps=0, warmup=CHECKED)
    print("\n| step | trained tokens | loss of trainwright | loss of TRL on the same rows |\n|---|---|---|---|")
    for number, (mine, other) in enumerate(zip(ours.warmup_values, theirs.warmup_values, strict=True), start=1):
        print(f"| {number} | {mine[1]:,.0f} and {other[1]:,.0f} | {mine[0]:.4f} | {other[0]:.4f} |", flush=True)
        if mine[1] != other[1] or abs(mine[0] - other[0]) > CLOSE:
            sys.exit(f"the sides do not do the same: losses differ by {abs(mine[0] - other[0]):.4f}, bar {CLOSE}")


def fastest(options: argparse.Namespace, folder: Path, variants: Sequence[Variant]) -> Variant:
    """The variant of TRL that trains most tokens a second, each tried alone for a few small steps."""
    wanted = [variant for variant in variants if options.only in str(variant)]
    if not wanted:
        sys.exit(f"--only {options.only!r} is in none of: {'; '.join(map(str, variants))}")
    if len(wanted) == 1:
        return wanted[0]
    rows = min(TRIED_ROWS, options.rows)
    paces = {}
    for variant in wanted:
        side = trl_side(options, folder, rows, variant)
        alternate([side], turns=1, steps=3, warmup=1)
        paces[variant] = statistics.mean(value[1] for value in side.values[1:]) / side.seconds()
    print(f"\n| tried on steps of {rows} rows | trained tokens/s |\n|---|---|")
    for variant, pace in paces.items():
        print(f"| {variant} | {pace:,.0f} |", flush=True)
    return max(paces, key=lambda variant: paces[variant])


def print_table(sides: Sequence[Contender]) -> None:
    print("| side | s/step (fastest-slowest turn) | trained tokens/s | row tokens/s | trainwright is |")
    print("|---|---|---|---|---|")
    rates: dict[str, float] = {}
    for side in sides:
        low, high = side.spread()
        trained, tokens = (statistics.mean(value[place] for value in side.values) for place in (1, 2))
        rates[side.name] = trained / side.seconds()
        print(
            f"| {side.name} | {side.seconds():.3f} ({low:.3f}-{high:.3f}) | {rates[side.name]:,.0f} |"
            f" {tokens / side.seconds():,.0f} | {rates[OURS] / rates[side.name]:.2f}x |"
        )


def compare(options: argparse.Namespace, folder: Path) -> None:
    count = prepare(options.source, folder)
    check_same_job(options, folder)
    sides = [our_side(options, folder, options.rows)]
    for variants in (ISOLATED, WRAPPED) if options.wrapped else (ISOLATED,):
        sides.append(trl_side(options, folder, options.rows, fastest(options, folder, variants)))
    alternate(sides, turns=options.turns, steps=options.steps, warmup=WARMUP)
    print(f"\n{count:,} chats, steps of {options.rows} rows of {LENGTH} tokens\n")
    print_table(sides)


def be_side(options: argparse.Namespace) -> None:
    folder, rows = Path(options.folder), options.step_rows
    if options.side == OURS:
        take_turns(lambda step_done: train_ours(folder, rows, step_done))
        return
    variant, same = Variant(options.micro, options.compiled, options.packing), options.side == SAME_ROWS
    take_turns(lambda step_done: train_trl(folder, rows, variant, step_done, same_rows=same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--trl-python", default=sys.executable, help="Python of the environment with trl")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=STEP_ROWS, help="rows of an optimizer step")
    parser.add_argument("--only", default="", help="try only variants of TRL whose names hold this: 'eager', ...")
    parser.add_argument("--wrapped", action="store_true", help="a third side: TRL's packing that mixes chats")
    for hidden in ("--side", "--folder", "--packing"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--step-rows", "--micro"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        be_side(options)
        return
    if not options.source.is_file():
        sys.exit(f"{options.source} is not there: give a jsonl file whose rows have instruction and output")
    if subprocess.run([options.trl_python, "-c", "import trl"], capture_output=True).returncode:
        sys.exit(f"{options.trl_python} has no trl: pip install 'trl>=1.16' there, or name another with --trl-python")
    with tempfile.TemporaryDirectory() as name:
        compare(options, Path(name))


if __name__ == "__main__":
    main()
