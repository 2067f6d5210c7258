"""The tokenizer that the rest of the house uses: a thin, thread-safe wrapper of the Rust `tokenizers` library.

It adds what training and generation need around the library's pipeline: the ids of the special tokens, a fingerprint,
refusals instead of silent losses, streaming decoding, and a folder that `transformers.AutoTokenizer` opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers as rust

from trainwright.base.errors import DataError
from trainwright.data.streaming import StreamDecoder
from trainwright.data.templates import CHATML_TEMPLATE, render_chat

__all__ = ["ROLES", "Tokenizer", "parallelism"]

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
"""What a special token can be for; `transformers` calls them bos_token, eos_token, ..."""

_UNLIMITED = int(1e30)  # what `transformers` writes for a model_max_length that is not known


class Tokenizer:
    """Text to ids and back. Immutable after construction, so threads and forked or spawned workers may share it.

    Args:
        core: the library's tokenizer; truncation and padding in it are switched off, because rows are cut elsewhere.
        special: role (one of ROLES) to token; each must be in the vocabulary.
        chat_template: Jinja source that turns messages into text.
        model_max_length: tokens that the model was made for, written to the saved folder.
    """

    def __init__(
        self,
        core: rust.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self.core = core
        self.special: dict[str, str] = dict(special or {})
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        for role, token in self.special.items():
            if role not in ROLES:
                raise DataError(f"no special token role {role!r}; known: {', '.join(ROLES)}")
            if core.token_to_id(token) is None:
                raise DataError(
                    f"the {role} token {token!r} is not among the tokenizer's {core.get_vocab_size()} tokens",
                    hint="correct the special tokens in tokenizer_config.json or special_tokens_map.json",
                )

    def __getstate__(self) -> dict[str, Any]:
        # cached values are cheap to make again and would double the pickle
        return {name: self.__dict__[name] for name in ("core", "special", "chat_template", "model_max_length")}

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special={self.special})"

    # ---- what it knows

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs. Ids may have holes below it."""
        return max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.core.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        """Id of the token before a document, if the tokenizer has one."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a document."""
        return self._id("eos")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._id("pad")

    @property
    def unk_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell."""
        return self._id("unk")

    def special_id(self, role: str) -> int | None:
        """Id of any role of ROLES, None when the tokenizer has no such token."""
        return self._id(role)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return frozenset(i for i, token in self.core.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits: the hash of tokenizer.json in canonical form, independent of spacing and key order."""
        text = json.dumps(json.loads(self.core.to_str()), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # ---- text to ids

    @cached_property
    def _plain_core(self) -> rust.Tokenizer:
        """A second pipeline that reads special tokens in the text as the plain characters they are."""
        core = rust.Tokenizer.from_str(self.core.to_str())
        core.encode_special_tokens = True
        return core

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters of a character-level vocabulary without <unk>, where others would vanish silently."""
        model = json.loads(self.core.to_str())["model"]
        lossy = model["type"] == "BPE" and not model["merges"] and model["unk_token"] is None
        if not lossy or model["byte_fallback"] or self.core.pre_tokenizer is not None:
            return None
        return frozenset("".join(self.core.get_vocab(with_added_tokens=True)))

    def _checked(self, text: str) -> None:
        alphabet = self._alphabet
        if alphabet is not None and (unknown := set(text) - alphabet):
            shown = ", ".join(repr(character) for character in sorted(unknown)[:10])
            raise DataError(
                f"{len(unknown)} kinds of characters are not in the tokenizer's alphabet of {len(alphabet)}: {shown}",
                hint="train the tokenizer on text that has them, or give it an <unk> token",
            )

    def encode(self, text: str, add_special: bool = False, *, parse_special: bool = True) -> list[int]:
        """Token ids of one text.

        `add_special` adds what the tokenizer adds around a text for its model (such as `<s>` before it).
        `parse_special=False` reads special tokens written in the text as plain characters: right for documents and for
        what strangers type. Raises DataError for text that has no UTF-8 form or that the alphabet cannot spell.
        """
        self._checked(text)
        core = self.core if parse_special else self._plain_core
        with _readable(text):
            ids: list[int] = core.encode(text, add_special_tokens=add_special).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special: bool = False, *, parse_special: bool = True
    ) -> list[list[int]]:
        """Token ids of many texts, on all cores that `parallelism` allows. The same ids as one `encode` per text."""
        if self._alphabet is not None:
            for text in texts:
                self._checked(text)
        core = self.core if parse_special else self._plain_core
        with _readable(*texts):
            encodings = core.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str, *, parse_special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of one text and, for each, the [start, end) of the characters of `text` that it stands for.

        Nothing is added around the text. Tokens that share a character (bytes of one) have the same place; where a
        tokenizer counts the space before a word to its first token, so does the place. Errors as `encode`.
        """
        self._checked(text)
        core = self.core if parse_special else self._plain_core
        with _readable(text):
            encoding = core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids (a list, an array or a tensor). Raises DataError for an id outside the vocabulary."""
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if values and not (min(values) >= 0 and max(values) < self.vocab_size):
            wrong = next(value for value in values if not 0 <= value < self.vocab_size)
            raise DataError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}",
                hint="ids such as -100 mark labels that are not trained: leave them out before decoding",
            )
        text: str = self.core.decode(values, skip_special_tokens=skip_special)
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id as the library spells it, None for a hole."""
        entry: str | None = self.core.id_to_token(token_id)
        return entry

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one and gives text as soon as it is certain."""
        return StreamDecoder(self, skip_special=skip_special)

    # ---- chats

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Messages as the text that the model was made for, by its own template (ChatML when it has none).

        Encode the result with `add_special=False`: templates write their own special tokens.
        """
        special = {f"{role}_token": token for role, token in self.special.items()}
        return render_chat(
            self.chat_template or CHATML_TEMPLATE,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **{**special, **variables},
        )

    # ---- to disk

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, each whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        named = {f"{role}_token": token for role, token in self.special.items()}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.model_max_length or _UNLIMITED,
            "clean_up_tokenization_spaces": False,
            **named,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write(target / "tokenizer.json", self.core.to_str(pretty=True))
        _write(target / "special_tokens_map.json", json.dumps(named, ensure_ascii=False, indent=2))
        _write(target / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        return target


@contextlib.contextmanager
def _readable(*texts: str) -> Iterator[None]:
    """The library says only "must be str" for a str with a lone surrogate; this names the place."""
    try:
        yield
    except TypeError as error:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as bad:
                raise DataError(
                    f"text {index} has the lone surrogate U+{ord(text[bad.start]):04X} at character {bad.start}, "
                    "which is not text",
                    hint="remove it, or replace it with U+FFFD",
                ) from error
        raise


@contextlib.contextmanager
def parallelism(on: bool) -> Iterator[None]:
    """Allow or forbid the library's own threads inside the context: off in worker processes that fill the cores."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if on else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _write(path: Path, text: str) -> None:
    """Replace a file by a complete new one, or leave it as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a model folder is for whoever may read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
