"""Decode ids while they arrive, without ever showing half a character or taking a character back.

A token can end inside a UTF-8 character (most Chinese characters and emoji take several byte tokens), and decoders look
at neighbours (a leading space, a run of byte tokens). So each step decodes a short window, the last tokens shown and
those waiting, and shows only what no later token can change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["StreamDecoder"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet one


class StreamDecoder:
    """Takes ids by `push`, gives text that never changes later; all pieces together equal `decode` of all ids.

    Text is held back while it ends inside a character. With byte-fallback vocabularies (Llama 2) it is held for a whole
    run of byte tokens, because that decoder judges the run as one: a broken byte turns the run into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._window: list[int] = []
        self._start = 0  # tokens of the window from here on are waiting
        self._shown = 0  # characters of the window's text that were given out
        self._holds_bytes = "ByteFallback" in json.dumps(_decoder_types(tokenizer))

    def push(self, token_id: int) -> str:
        """The text that has become certain with this id; often empty inside a character."""
        token_id = int(token_id)
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if self._holds_bytes and _BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or ""):
            return ""
        text = self._decode(self._window)
        certain = text.rstrip(_BROKEN)
        if len(certain) == len(text):
            piece = text[self._shown :]
            self._window = self._window[self._start :]
            self._start = len(self._window)
            self._shown = len(self._decode(self._window))
            return piece
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return piece

    def push_many(self, ids: Iterable[int]) -> str:
        """The same for several ids at once."""
        return "".join([self.push(token_id) for token_id in ids])

    def finish(self) -> str:
        """What is still held, broken characters shown as U+FFFD. The decoder is as new afterwards."""
        piece = self._decode(self._window)[self._shown :] if self._window else ""
        self._window, self._start, self._shown = [], 0, 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


def _decoder_types(tokenizer: Tokenizer) -> object:
    """The decoder's part of tokenizer.json, taken from its own state to avoid writing out the vocabulary."""
    decoder = tokenizer.core.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())
