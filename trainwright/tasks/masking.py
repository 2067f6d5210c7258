"""Which tokens of a row are hidden, and by what: numpy in, numpy out, a pure function of (seed, draw number).

Units that are chosen together are single tokens (BERT, arXiv 1810.04805), whole words, or spans of words (SpanBERT,
arXiv 1907.10529: lengths from a geometric distribution of p = 0.2, at most 10 words).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.seeds import derive_seed
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["IGNORE", "Masking", "Pieces", "WordTable", "word_table"]

IGNORE = -100
SPAN_P = 0.2
SPAN_MAX = 10
HIDDEN, REPLACED = 0.8, 0.9  # of what is predicted, 80 % are hidden, the next 10 % replaced, the rest left

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class WordTable:
    """How tokens join to words, by id: a token goes on with the word before it if it `joins`, or if it begins like a
    word (`open_left`) and what stands before ends like one (`open_right`)."""

    joins: Flags
    open_left: Flags
    open_right: Flags

    def continues(self, ids: Numbers) -> Flags:
        """Which tokens [B, T] belong to the same word as the token before them; the first of a row never does."""
        inside = self.joins[ids].copy()
        inside[:, 1:] |= self.open_left[ids[:, 1:]] & self.open_right[ids[:, :-1]]
        inside[:, 0] = False
        return inside


def word_table(tokenizer: Tokenizer) -> WordTable:
    """How the tokens of a tokenizer join to words.

    WordPiece and word-level: `##` continues a word. Byte-level, sentencepiece and characters: letters and digits go on
    without a space between them. A Chinese, Japanese or Korean character is a word of its own everywhere, and so is a
    punctuation mark.
    """
    size = tokenizer.vocab_size
    joins, left, right = (np.zeros(size, dtype=bool) for _ in range(3))
    names = [tokenizer.token(index) for index in range(size)]
    apart = json.loads(tokenizer.core.to_str())["model"]["type"] in ("WordPiece", "WordLevel")  # text is cut before
    byte_level = _spells_bytes(names)
    for index, name in enumerate(names):
        if name is None or index in tokenizer.special_ids or not name:
            continue
        if apart:
            joins[index] = name.startswith("##") and len(name) > 2
            continue
        text = _bytes_of(name).decode("utf-8", errors="replace") if byte_level else name.replace("\u2581", " ")
        if byte_level and 0x80 <= _bytes_of(name)[0] <= 0xBF:  # goes on with a character that the token before began
            joins[index] = True
        left[index] = _is_letter(text[:1])
        right[index] = _is_letter(text[-1:]) or text == " "  # a space alone is the beginning of a word
    return WordTable(joins, left, right)


def _is_letter(character: str) -> bool:
    return character.isalnum() and not _is_ideograph(character)


def _is_ideograph(character: str) -> bool:
    """Scripts that are written without spaces between words: Chinese characters, kana, hangul."""
    code = ord(character)
    return (
        0x2E80 <= code <= 0x9FFF or 0xAC00 <= code <= 0xD7AF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF
    )


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2): printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _spells_bytes(names: list[str | None]) -> bool:
    return "\u0120" in {name[0] for name in names if name}  # how they write a space


def _bytes_of(name: str) -> bytes:
    return bytes(_BYTES.get(character, 0x3F) for character in name)


@dataclass(frozen=True)
class Pieces:
    """Where texts are in rows [B, T]: `real` tokens (no padding), and which of them begin and end a text."""

    real: Flags
    first: Flags
    last: Flags

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]], pad_id: int) -> Pieces:
        """Of a batch of running text: padding is at the end of a row, has no label and is the padding token; texts of
        one row differ in `document_ids`."""
        ids, labels = arrays["input_ids"], arrays["labels"]
        blank = (ids == pad_id) & (labels == IGNORE)
        real = ~np.logical_and.accumulate(blank[:, ::-1], axis=1)[:, ::-1]
        documents = arrays.get("document_ids")
        edge = np.zeros_like(real)
        if documents is not None:
            edge[:, 1:] = documents[:, 1:] != documents[:, :-1]
        edge[:, 0] = True
        ends = np.ones_like(real)
        ends[:, :-1] = edge[:, 1:] | ~real[:, 1:]
        return cls(real, edge & real, ends & real)


@dataclass(frozen=True)
class Masking:
    """Hides tokens.

    Attributes:
        kind: "token", "word" or "span".
        share: of the tokens that may be predicted.
        mask_id: the token that hides.
        random_ids: what replaces others.
        special: by id, tokens that are never chosen.
        words: how tokens join to words.
    """

    kind: str
    share: float
    mask_id: int
    random_ids: Numbers
    special: Flags
    words: WordTable

    def hide(self, ids: Numbers, pieces: Pieces, draws: Numbers, seed: int) -> tuple[Numbers, Numbers]:
        """(inputs, labels) [B, T] of ids [B, T]: labels are the ids where tokens are predicted, IGNORE elsewhere."""
        allowed = pieces.real & ~self.special[ids]
        starts = np.ones_like(allowed)
        if self.kind != "token":
            starts = ~self.words.continues(ids) | pieces.first
            starts[:, 1:] |= self.special[ids[:, :-1]]
        inputs, labels = ids.copy(), np.full_like(ids, IGNORE)
        for row, draw in enumerate(np.asarray(draws).tolist()):
            source = np.random.Generator(np.random.Philox(key=derive_seed(seed, "masked_lm", draw)))
            chosen, fate = self._choose(allowed[row], starts[row], pieces.first[row], source)
            substitutes = self.random_ids[source.integers(len(self.random_ids), size=ids.shape[1])]
            labels[row, chosen] = ids[row, chosen]
            inputs[row, chosen & (fate < HIDDEN)] = self.mask_id
            replaced = chosen & (fate >= HIDDEN) & (fate < REPLACED)
            inputs[row, replaced] = substitutes[replaced]
        return inputs, labels

    def _choose(
        self, allowed: Flags, starts: Flags, first: Flags, source: np.random.Generator
    ) -> tuple[Flags, NDArray[np.float64]]:
        """Which tokens of a row are predicted, and a number in [0, 1) that says what happens to each."""
        length = len(allowed)
        if self.kind == "span":
            return self._spans(allowed, starts, first, source)
        lots, fate = source.random(length), source.random(length)
        unit = np.cumsum(starts) - 1  # the number of each token's word; of the word's lots the first counts
        return allowed & (lots[unit] < self.share), fate

    def _spans(
        self, allowed: Flags, starts: Flags, first: Flags, source: np.random.Generator
    ) -> tuple[Flags, NDArray[np.float64]]:
        """Spans of words inside one text until the share is reached; all tokens of a span have one fate."""
        chosen, fate = np.zeros_like(allowed), np.zeros(len(allowed))
        budget = self._budget(int(allowed.sum()), source)
        beginnings = np.flatnonzero(starts & allowed)
        if not len(beginnings) or not budget:
            return chosen, fate
        barriers = np.flatnonzero(first | ~allowed)  # a span ends before another text, a special token, padding
        edges = np.append(np.flatnonzero(starts), len(allowed))
        taken = 0
        for begin in source.permutation(beginnings):
            if taken >= budget:
                break
            words = min(int(source.geometric(SPAN_P)), SPAN_MAX)
            until = edges[min(np.searchsorted(edges, begin) + words, len(edges) - 1)]
            barrier = barriers[np.searchsorted(barriers, begin, side="right") :]
            until = min(until, int(barrier[0])) if len(barrier) else until
            # Whole words while they fit into what is left; the last one with the chance that is right on average.
            inner = edges[(edges > begin) & (edges <= until)]
            fitting = inner[inner - begin <= budget - taken]
            until = int(fitting[-1]) if len(fitting) else int(inner[0]) if len(inner) else until
            if chosen[begin:until].any():
                continue
            if source.random() * (until - begin) >= budget - taken:
                break
            chosen[begin:until], fate[begin:until] = True, source.random()
            taken += until - begin
        return chosen, fate

    def _budget(self, tokens: int, source: np.random.Generator) -> int:
        """The share of so many tokens as a whole number, right on average."""
        wanted = self.share * tokens
        return int(wanted) + int(source.random() < wanted - int(wanted))
