"""How many tokens a row trains under each packing mode, on instruction text.

    python benchmarks/data/packing.py [--data ../shared/data] [--sequence-length 512] [--vocab-size 8192]

Each example becomes one document: its instruction, input and answer, joined by line breaks. A byte-level BPE
tokenizer is trained on each set. The ratio is trained tokens per row, `best_fit` over `pad`: what a model of fixed
shape gains in tokens per second when a row costs the same whatever it holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from trainwright.data.build import prepare_dataset
from trainwright.data.documents import SourceSpec
from trainwright.data.readers import list_shards, read_rows
from trainwright.data.spec import BuildSpec, TrainTokenizer

SETS = {
    "dolly_slice": "dolly_slice/*.jsonl",
    "gsm8k": "gsm8k/train.jsonl",
    "alpaca_zh": "alpaca_zh_carbonz0/*.json",
    "instructions (rasbt)": "rasbt_llms_from_scratch/instruction-data.json",
}
FIELDS = ("instruction", "question", "input", "output", "answer", "response")


def write_documents(pattern: str, path: Path) -> int:
    """One JSON line with a text for each example; the number of examples."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for shard in list_shards(SourceSpec(pattern)):
            for row in read_rows(shard, on_error="skip"):
                if isinstance(row.fields, str):
                    continue
                parts = [str(row.fields[name]) for name in FIELDS if row.fields.get(name)]
                if parts:
                    file.write(json.dumps({"text": "\n".join(parts)}, ensure_ascii=False) + "\n")
                    count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    options = parser.parse_args()

    print(f"rows of {options.sequence_length} tokens, byte-level BPE of {options.vocab_size}")
    print(
        f"{'text':<22}{'examples':>9}  {'packing':<9}{'rows':>7}{'padding':>9}{'trained/row':>13}{'cut':>6}{'ratio':>8}"
    )
    for name, pattern in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "documents.jsonl"
            if not any(options.data.glob(pattern)):
                print(f"{name:<22}not found: {options.data / pattern}")
                continue
            examples = write_documents(str(options.data / pattern), path)
            base = 0.0
            for packing in ("pad", "best_fit", "concat"):
                spec = BuildSpec(
                    (SourceSpec(str(path)),),
                    TrainTokenizer("bpe", options.vocab_size),
                    sequence_length=options.sequence_length,
                    packing=packing,
                    document_mask=packing != "pad",
                    validation=None,
                )
                facts = prepare_dataset(spec, Path(folder) / "cache").facts("train")
                per_row = facts.trained_tokens / facts.rows
                base = base or per_row
                print(
                    f"{name:<22}{examples:>9,}  {packing:<9}{facts.rows:>7,}"
                    f"{facts.padding_share(options.sequence_length):>9.2%}{per_row:>13.1f}"
                    f"{facts.split_documents:>6,}{per_row / base:>7.2f}x"
                )


if __name__ == "__main__":
    main()
