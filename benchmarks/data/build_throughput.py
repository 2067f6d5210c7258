"""How much of the tokenizer's own speed `data build` keeps, against a bare `tokenizers.encode_batch` loop.

    python benchmarks/data/build_throughput.py [--source python-stdlib] [--text-field text] [--rounds 3] [--workers N]

A: texts already in memory, `encode_batch` on batches of 1,000 documents with the library's own threads, ids counted
   and thrown away.
B: `build_dataset` from the files: reading, splitting, tokenizing, writing, fsync, packing, hashing, manifest.

Both use the same tokenizer (byte-level BPE of 8,192, trained on the text beforehand). Rounds alternate A B A B; the
ratio is B's throughput over A's, of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from trainwright.data.build import build_dataset
from trainwright.data.documents import SourceSpec
from trainwright.data.readers import list_shards, read_shard
from trainwright.data.spec import BuildSpec, default_workers
from trainwright.data.tokenizers import load_tokenizer, train_tokenizer

BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python-stdlib")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--tokenizer", help="load this tokenizer instead of training one")
    parser.add_argument("--packing", default="best_fit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args()

    source = SourceSpec(options.source, text_field=options.text_field)
    texts = [
        document.text
        for shard in list_shards(source)
        for document in read_shard(shard, text_field=options.text_field, on_error="skip")
    ]
    size = sum(len(text.encode("utf-8")) for text in texts)
    tokenizer = (
        load_tokenizer(options.tokenizer) if options.tokenizer else train_tokenizer("bpe", 8192, (t for t in texts))
    )
    spec = BuildSpec((source,), tokenizer, packing=options.packing, on_error="skip")
    print(f"{options.source}: {len(texts):,} documents, {size / 2**20:.1f} MiB; {options.workers} workers")

    bare, built = [], []
    for number in range(options.rounds):
        began = time.perf_counter()
        tokens = 0
        for begin in range(0, len(texts), BATCH):
            tokens += sum(len(one.ids) for one in tokenizer.core.encode_batch(texts[begin : begin + BATCH]))
        bare.append(size / 2**20 / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            build_dataset(spec, Path(folder) / "dataset", options.workers)
            built.append(size / 2**20 / (time.perf_counter() - began))
        print(f"round {number}: bare loop {bare[-1]:.2f} MiB/s, data build {built[-1]:.2f} MiB/s")
    ratio = statistics.median(built) / statistics.median(bare)
    print(
        f"median: bare loop {statistics.median(bare):.2f} MiB/s, data build {statistics.median(built):.2f} MiB/s, "
        f"ratio {ratio:.2f} (bar: 0.80)"
    )


if __name__ == "__main__":
    main()
