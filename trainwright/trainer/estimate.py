"""An estimate of a dataset from the sizes of its files, for a dry run that builds nothing."""

from __future__ import annotations

from trainwright.data import BuildSpec, TrainTokenizer, list_shards, load_tokenizer
from trainwright.data.corpus import held_out_fraction
from trainwright.planner import DataFacts

__all__ = ["estimate_data"]

# UTF-8 bytes per token of a byte-level BPE of about 8,000 tokens: 3.4 on Python's standard library, 3.6 on wikitext-2.
BYTES_PER_TOKEN = 3.5
# Compressed text unpacks to about this many times its size (gzip and zstd on source code and prose: 3.5-4.5).
COMPRESSION = 4.0

# Kinds of characters in a text of one script; Chinese has thousands, which a dry run cannot know.
CHARACTERS = 256


def estimate_data(spec: BuildSpec) -> DataFacts:
    """Rows and tokens as they will be, within some tens of percent."""
    size = 0.0
    for source in spec.sources:
        for shard in list_shards(source):
            size += (shard.size or 0) * (COMPRESSION if shard.compression else 1.0)
    tokenizer = spec.tokenizer
    if isinstance(tokenizer, TrainTokenizer):
        vocab_size = tokenizer.vocab_size if tokenizer.kind != "char" else CHARACTERS
        tokens = size / (BYTES_PER_TOKEN if tokenizer.kind != "char" else 1.0)
    else:
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        vocab_size, tokens = loaded.vocab_size, size / BYTES_PER_TOKEN
    validation = tokens * held_out_fraction(spec, int(size))
    length = spec.sequence_length
    return DataFacts(
        train_rows=max(1, int((tokens - validation) // length)),
        validation_rows=int(validation // length),
        sequence_length=length,
        trained_per_row=float(length),
        vocab_size=vocab_size,
        estimated=True,
    )
