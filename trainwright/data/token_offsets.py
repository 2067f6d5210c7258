"""Texts as tokens with their places in the text, and what tokens do at the border of a prompt and its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["USUAL_ANSWERS", "TokenOffsets", "encode_offsets", "overhang", "reserved_pattern", "speakable"]

# How answers begin, for finding tokens that reach over the border of the prompt.
USUAL_ANSWERS = ("A", "The", "I", "H", "a", "1", "中", "你", "这", '"', "#", "<", "{", "-", "*")


@dataclass(frozen=True)
class TokenOffsets:
    """Token ids of a text, and the characters [start, end) that each stands for. All [tokens], int64."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def inside(self, start: int, end: int) -> NDArray[np.bool_]:
        """Tokens that hold a character of [start, end), bool [tokens]."""
        touching: NDArray[np.bool_] = (self.ends > start) & (self.starts < end) & (self.ends > self.starts)
        return touching


def encode_offsets(tokenizer: Tokenizer, text: str) -> TokenOffsets:
    """Ids and offsets of one text whose special tokens are read as such; nothing is added around it.

    Raises DataError for text without a UTF-8 form and for characters that the alphabet cannot spell.
    """
    ids, places = tokenizer.encode_with_offsets(text)
    offsets = np.array(places, dtype=np.int64).reshape(-1, 2)
    return TokenOffsets(np.array(ids, dtype=np.int64), offsets[:, 0], offsets[:, 1])


def overhang(tokenizer: Tokenizer, prompt: str, wholes: Sequence[str] = ()) -> int:
    """Characters at the end of a prompt that can be one token with the beginning of an answer. They are left to the
    model, in training and in serving (`assistant: ` and `Hello` may become `:` and ` Hello`).

    Args:
        wholes: the prompt with answers behind it; none given: with usual beginnings of answers. One that does not begin
            with the prompt says nothing.
    """
    tokens = encode_offsets(tokenizer, prompt)
    stable = len(tokens.ids)
    for whole in wholes or [prompt + answer for answer in USUAL_ANSWERS]:
        if whole.startswith(prompt) and _spelt(tokenizer, whole[len(prompt) :]):
            ids = encode_offsets(tokenizer, whole).ids[: len(tokens.ids)]
            same = tokens.ids[: len(ids)] == ids
            stable = min(stable, len(ids) if same.all() else int(np.argmin(same)))
    return len(prompt) - (int(tokens.ends[stable - 1]) if stable else 0)


def reserved_pattern(tokenizer: Tokenizer, further: Sequence[int] = ()) -> re.Pattern[str]:
    """Finds special tokens of a tokenizer, and `further` added ones by id, in texts that people wrote."""
    tokens = tokenizer.core.get_added_tokens_decoder().items()
    found = (token.content for number, token in tokens if token.special or number in further)
    names = sorted(found, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def speakable(tokenizer: Tokenizer) -> str:
    """A text that the tokenizer can spell, for finding out what stands around texts."""
    letters = sorted(token for token in tokenizer.core.get_vocab(with_added_tokens=False) if len(token) == 1)
    for text in ("A", "a", "1", *letters):
        if not text.isspace() and _spelt(tokenizer, text):
            return text
    return "A"


def _spelt(tokenizer: Tokenizer, text: str) -> bool:
    try:
        ids = tokenizer.encode(text)
    except DataError:
        return False
    return bool(ids) and tokenizer.unk_id not in ids
