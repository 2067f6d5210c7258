"""Make the data of the recipe sft-addition: additions of two two-digit numbers as chats, the same bytes every time.

    python examples/make_addition.py --out data/addition

writes train.jsonl (7,290 chats) and test.jsonl (810 others): all 8,100 sums of 10 to 99, shuffled by a fixed seed and
split 9 : 1. Answers are written from the last digit to the first by default, so that each digit depends only on digits
already read or written (Lee et al. 2023, arXiv 2307.03381); --forward writes them as people do.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SEED = 20240229
TEST_SHARE = 0.1


def additions(*, forward: bool = False) -> list[dict[str, object]]:
    """All chats, in the shuffled order: {"messages": [the sum asked for, its digits]}."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(SEED).shuffle(pairs)
    chats: list[dict[str, object]] = []
    for a, b in pairs:
        digits = str(a + b)
        answer = digits if forward else digits[::-1]
        messages = [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": answer}]
        chats.append({"messages": messages})
    return chats


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Two-digit additions as chats, for the recipe sft-addition.")
    parser.add_argument("--out", type=Path, default=Path("data/addition"), help="the folder to write to")
    parser.add_argument("--forward", action="store_true", help="answers from the first digit to the last")
    options = parser.parse_args()
    chats = additions(forward=options.forward)
    held_out = round(TEST_SHARE * len(chats))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", chats[:held_out]), ("train", chats[held_out:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.out / f'{name}.jsonl'}: {len(rows):,} chats")


if __name__ == "__main__":
    main()
