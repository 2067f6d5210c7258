"""Train tokenizers: byte-level BPE, which spells any text exactly, and character level, the simplest that works.

Both are deterministic: the same texts give the same tokenizer whatever the number of threads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers as rust
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["END_OF_TEXT", "WORD_PATTERN", "byte_level_pipeline", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4 and Llama 3 cut text before merging (cl100k). Keeps runs of indentation whole, numbers in threes."""

_SMALLEST_BPE = 256  # one token for each byte
_BATCH = 512  # texts handed to the library at once


def train_tokenizer(
    kind: str,
    vocab_size: int | None,
    texts: Iterable[str],
    *,
    special: Sequence[str] | None = None,
    min_frequency: int = 2,
) -> Tokenizer:
    """A tokenizer of `kind` "bpe" or "char" learned from texts, which are read once.

    `vocab_size` counts special tokens. For "bpe" it is the target (small corpora can give fewer); for "char" it is a
    limit, None for none: the most frequent characters stay, and the rest become `<unk>`. Pairs seen fewer than
    `min_frequency` times are not merged ("bpe" only).
    `special` defaults to `<|endoftext|>` for "bpe" and to `<unk>`, `<|endoftext|>` for "char"; they come first in a BPE
    vocabulary and last in a character one. `<|endoftext|>` (else the first that is not `<unk>`) ends documents.

    Raises ConfigError for a size that cannot hold the alphabet, DataError when there is no text.
    """
    counted = _Counted(texts)
    if kind == "bpe":
        names = list(special) if special is not None else [END_OF_TEXT]
        core = _train_bpe(vocab_size, counted, names, min_frequency)
    elif kind == "char":
        names = list(special) if special is not None else [UNKNOWN, END_OF_TEXT]
        core = _train_characters(vocab_size, counted, names)
    else:
        raise ConfigError(f"tokenizer kind {kind!r} is not known", hint="use bpe or char")
    return Tokenizer(core, special=_roles(names))


class _Counted:
    """Passes texts on and counts their characters, so that an empty corpus is noticed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text

    def check(self) -> None:
        if not self.characters:
            raise DataError(
                "no text to train the tokenizer on: the sources gave no document with text",
                hint="check the sources and text_field of the data",
            )


def _roles(names: Sequence[str]) -> dict[str, str]:
    """Which special token is for what, by the customs of GPT-2 and Llama."""
    roles: dict[str, str] = {}
    if UNKNOWN in names:
        roles["unk"] = UNKNOWN
    usual = {"bos": ("<s>", "<bos>"), "eos": ("</s>", "<eos>"), "pad": ("<pad>", "<|pad|>")}
    others = [name for name in names if name != UNKNOWN]
    fallback = END_OF_TEXT if END_OF_TEXT in names else next(iter(others), None)
    for role, customs in usual.items():
        token = next((name for name in customs if name in names), fallback)
        if token is not None:
            roles[role] = token
    if "pad" in roles and roles["pad"] not in usual["pad"] and "eos" in roles:
        roles["pad"] = roles["eos"]
    return roles


def byte_level_pipeline(core: rust.Tokenizer, pattern: str | None) -> rust.Tokenizer:
    """Give a BPE model the byte-level steps around it, cutting words by `pattern` (None: the one of GPT-2)."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        core.pre_tokenizer = bytes_only
    else:
        words = pre_tokenizers.Split(rust.Regex(pattern), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    core.decoder = decoders.ByteLevel()
    return core


def _train_bpe(vocab_size: int | None, texts: _Counted, special: list[str], min_frequency: int) -> rust.Tokenizer:
    smallest = _SMALLEST_BPE + len(special)
    if vocab_size is None or vocab_size < smallest:
        raise ConfigError(
            f"a byte-level BPE vocabulary of {vocab_size} is too small: {_SMALLEST_BPE} bytes and {len(special)} "
            f"special tokens need {smallest}",
            hint="use 4096 or more for a small model, 32768 for a larger one",
        )
    core = byte_level_pipeline(rust.Tokenizer(models.BPE()), WORD_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_batches(texts), trainer)
    texts.check()
    return core


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _train_characters(vocab_size: int | None, texts: _Counted, special: list[str]) -> rust.Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    texts.check()
    characters = sorted(counts)
    if vocab_size is not None and len(characters) + len(special) > vocab_size:
        room = vocab_size - len(special)
        if UNKNOWN not in special or room < 1:
            raise ConfigError(
                f"the text has {len(characters)} kinds of characters and there are {len(special)} special tokens; a "
                f"vocabulary of {vocab_size} cannot hold them",
                hint=f"use {len(characters) + len(special)} or more, or the special token {UNKNOWN} for the rarest",
            )
        characters = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:room])
    vocabulary = {token: index for index, token in enumerate([*characters, *special])}
    # a BPE model without merges gives single characters seven times faster than a split into one-letter words
    core = rust.Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN if UNKNOWN in special else None))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([rust.AddedToken(token, normalized=False, special=True) for token in special])
    return core
