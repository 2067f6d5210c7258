"""The tokenizer of a build: given, loaded, or trained on the build's own texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from trainwright.data.spec import TrainTokenizer

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["given_tokenizer", "trained_tokenizer"]

# Text a BPE tokenizer learns from. More changes hardly any of the first 50,000 merges.
SAMPLE_CHARACTERS = 64 << 20


def given_tokenizer(chosen: TrainTokenizer | str | Tokenizer) -> Tokenizer | None:
    """The tokenizer that need not be trained: itself, or what stands at a path or under a hub name; None for one that
    has to be."""
    if isinstance(chosen, TrainTokenizer):
        return None
    if isinstance(chosen, str):
        from trainwright.data.tokenizers import load_tokenizer

        return load_tokenizer(chosen)
    return chosen


def trained_tokenizer(
    chosen: TrainTokenizer, texts: Callable[[int | None], Iterable[str]], added: Sequence[str] = ()
) -> Tokenizer:
    """A tokenizer trained as chosen.

    Args:
        texts: gives texts of about so many characters together, or all of them (None).
        added: special tokens that it must have.
    """
    from trainwright.data.tokenizers import train_tokenizer

    # every character and word must be seen to be counted; merges need only a sample
    merges = chosen.kind in ("bpe", "wordpiece")
    return train_tokenizer(
        chosen.kind,
        None if chosen.kind == "char" else chosen.vocab_size,
        texts(SAMPLE_CHARACTERS if merges else None),
        added=added,
        min_frequency=chosen.min_frequency,
        lowercase=chosen.lowercase,
    )
