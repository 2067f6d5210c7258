"""What stands around texts in a row: the special tokens of one text and of a pair, and where words begin.

A tokenizer that has a template of its own (BERT, RoBERTa, Llama) is asked for it, so that rows are what transformers'
tokenizers make of the same texts.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainwright.base.errors import ConfigError
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["ENCODER_TOKENS", "Frame", "Side", "WordPieces", "frame_of", "is_wide", "spaces_before"]

ENCODER_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""What a tokenizer that is trained for an encoder has, in the order of BERT."""


@dataclass(frozen=True)
class Side:
    """Ids before, between and after texts, and the token types of all parts in their order."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    types: tuple[int, ...] = ()  # of before, first text, between, second text, after; of one text: before, text, after

    @property
    def size(self) -> int:
        """Tokens beside the texts."""
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True)
class Frame:
    """How texts stand in a row.

    Attributes:
        one, two: around one text, and around a pair.
        encoder: whether a text begins with a token of its own that is read for the whole of it ([CLS]).
        typed: whether the second text of a pair has another token type.
    """

    one: Side
    two: Side
    encoder: bool
    typed: bool

    def single(self, ids: Sequence[int]) -> list[int]:
        """The row of one text."""
        return [*self.one.before, *ids, *self.one.after]

    def pair(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """The row of two texts."""
        return [*self.two.before, *first, *self.two.between, *second, *self.two.after]

    def pair_types(self, first: int, second: int) -> list[int]:
        """Token types of a pair of texts of these lengths."""
        sizes = (len(self.two.before), first, len(self.two.between), second, len(self.two.after))
        return [kind for kind, size in zip(self.two.types, sizes, strict=True) for _ in range(size)]


def frame_of(tokenizer: Tokenizer, frame: Literal["auto", "encoder", "decoder"] = "auto") -> Frame:
    """The frame that a tokenizer asks for; `frame` is `task.frame` of the recipe.

    Raises:
        ConfigError: an encoder's frame is wanted and the tokenizer has no [CLS] and [SEP].
    """
    cls, sep = (_special(tokenizer, role) for role in ("cls", "sep"))
    if frame == "encoder" and (cls is None or sep is None):
        raise ConfigError(
            "task.frame is encoder, and the tokenizer has no [CLS] and [SEP]",
            hint="write task.frame: auto, or train the tokenizer with this recipe",
        )
    if (own := _own_template(tokenizer)) is not None:
        encoder = cls is not None and own[0].before[:1] == (cls,)
        if frame == "auto" or (frame == "encoder") == encoder:
            return Frame(*own, encoder, typed=encoder and len(set(own[1].types)) > 1)
    if cls is not None and sep is not None and frame != "decoder":
        types = (0, 0, 0, 1, 1)
        return Frame(Side((cls,), (), (sep,), (0, 0, 0)), Side((cls,), (sep,), (sep,), types), True, typed=True)
    line = tuple(tokenizer.encode("\n", parse_special=False))
    end = tokenizer.eos_id
    between = line or ((end,) if end is not None else ())
    return Frame(Side(types=(0, 0, 0)), Side(between=between, types=(0, 0, 0, 0, 0)), False, typed=False)


def _special(tokenizer: Tokenizer, role: str) -> int | None:
    found = tokenizer.special_id(role)
    token: int | None = tokenizer.core.token_to_id(f"[{role.upper()}]") if found is None else found
    return token


def _own_template(tokenizer: Tokenizer) -> tuple[Side, Side] | None:
    """What the tokenizer adds around one text and around two, by what it does with a word."""
    word = next((word for word in ("a", "的", "1", "e") if tokenizer.encode(word, parse_special=False)), None)
    if word is None:
        return None
    one, two = tokenizer.core.encode(word), tokenizer.core.encode(word, word)  # special tokens are added
    if None not in one.sequence_ids:
        return None
    return _side(one, 1), _side(two, 2)


def _side(encoding: Any, texts: int) -> Side:
    places = [[i for i, owner in enumerate(encoding.sequence_ids) if owner == text] for text in range(texts)]
    edges = [0, *(edge for place in places for edge in (place[0], place[-1] + 1)), len(encoding.ids)]
    parts = [range(a, b) for a, b in itertools.pairwise(edges)]
    types: list[int] = []
    for part in parts:
        types.append(encoding.type_ids[part[0]] if len(part) else (types[-1] if types else 0))
    ids = [tuple(encoding.ids[i] for i in part) for part in parts]
    return Side(ids[0], ids[2] if texts == 2 else (), ids[-1], tuple(types))


def is_wide(character: str) -> bool:
    """Whether a character stands without spaces around it, as Chinese ones do."""
    return unicodedata.east_asian_width(character) in ("W", "F")


def spaces_before(words: Sequence[str]) -> list[bool]:
    """Whether there is a space before each word of a text: none before the first, and none beside wide characters."""
    return [
        bool(i and word and words[i - 1] and not (is_wide(words[i - 1][-1]) or is_wide(word[0])))
        for i, word in enumerate(words)
    ]


@dataclass
class WordPieces:
    """Ids of single words, such as their text would have in a sentence.

    Every word has at least one id: what a tokenizer leaves out (a control character) becomes its unknown token.
    """

    tokenizer: Tokenizer
    _known: dict[tuple[str, bool], list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # SentencePiece puts its mark of a space before every text, whether one was there or not.
        probe = self.tokenizer.encode("a", parse_special=False)
        self._marks = bool(probe) and str(self.tokenizer.token(probe[0])).startswith("▁")
        unknown = self.tokenizer.unk_id
        self._nothing = [unknown] if unknown is not None else self.tokenizer.encode("?", parse_special=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def ids(self, word: str, spaced: bool) -> list[int]:
        """Ids of a word, with the space before it where there is one."""
        found = self._known.get((word, spaced))
        if found is None:
            text = f" {word}" if spaced and not self._marks else word
            found = self.tokenizer.encode(text, parse_special=False)
            if self._marks and not spaced and len(found) > 1 and self.tokenizer.token(found[0]) == "▁":
                found = found[1:]
            found = found or self._nothing
            if len(self._known) < 1 << 16:
                self._known[word, spaced] = found
        return found
