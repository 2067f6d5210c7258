"""SentencePiece models as `tokenizers` pipelines that give the same ids, without the sentencepiece package.

A `.model` file is one protocol buffer message (sentencepiece_model.proto); the few fields that matter are read here
directly. The `tokenizer.bin` files of llama2.c hold the same vocabulary in a simpler form.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers as rust
from tokenizers import decoders, models, normalizers, processors

from trainwright.base.errors import DataError
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["read_llama2c_tokenizer", "read_sentencepiece"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_UNIGRAM, _BPE, _CHAR = 1, 2, 4  # TrainerSpec.ModelType
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int = _NORMAL


@dataclass
class _Vocabulary:
    """What decides the ids: pieces, the algorithm, and how text is normalised before it. Defaults are the proto's."""

    pieces: list[_Piece] = field(default_factory=list)
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    character_map: bytes = b""
    dummy_prefix: bool = True
    collapse_spaces: bool = True
    space_after: bool = False


def read_sentencepiece(path: Path, *, add_bos: bool | None = None, add_eos: bool | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file (BPE, Unigram or character).

    `add_bos` and `add_eos` say what `encode(add_special=True)` adds; by default a BPE model adds its bos token,
    as Llama and Mistral do, and others add nothing. Raises DataError for a damaged file, and for a model that
    `tokenizers` cannot match exactly.
    """
    data = path.read_bytes()
    try:
        vocabulary = _parse_model(data)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        kind = "a tiktoken vocabulary" if data[:1].isalnum() and b" 0\n" in data[:64] else "damaged or something else"
        raise DataError(
            f"{path}: not a SentencePiece model ({kind}; {len(data):,} bytes): {error}",
            hint="use the model's tokenizer.json, or download the file again",
        ) from error
    if any(piece.kind == _UNUSED for piece in vocabulary.pieces):
        raise DataError(
            f"{path}: has pieces of type UNUSED, which `tokenizers` cannot reproduce", hint="use tokenizer.json"
        )
    if vocabulary.space_after:
        raise DataError(f"{path}: puts spaces behind words, which is not supported", hint="use tokenizer.json")
    if vocabulary.algorithm not in (_UNIGRAM, _BPE, _CHAR):
        raise DataError(f"{path}: model type {vocabulary.algorithm} (word) is not supported", hint="use bpe or unigram")
    return _build(
        vocabulary, add_bos=vocabulary.algorithm == _BPE if add_bos is None else add_bos, add_eos=bool(add_eos)
    )


def read_llama2c_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a llama2.c `tokenizer.bin`: int32 longest piece, then float32 score, int32 length, bytes per id.

    The file leaves out the types: ids 0 to 2 are <unk>, <s>, </s>, and 3 to 258 the bytes, as in every Llama 2 model.
    """
    data = path.read_bytes()
    pieces: list[_Piece] = []
    offset = 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            text = data[offset + 8 : offset + 8 + length]
            if not 0 <= length <= len(text):
                raise ValueError(f"piece {len(pieces)} claims {length} bytes")
            pieces.append(_Piece(text.decode("utf-8").replace(" ", _SPACE), score))
            offset += 8 + length
        if len(pieces) < 259 or pieces[3].text != "<0x00>":
            raise ValueError(f"{len(pieces)} pieces; expected <unk>, <s>, </s>, 256 bytes and more")
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"{path}: not a llama2.c tokenizer: {error}", hint="use tokenizer.json or a .model file"
        ) from error
    for index, (name, kind) in enumerate((("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL))):
        pieces[index] = _Piece(name, 0.0, kind)
    pieces[3:259] = [_Piece(piece.text, piece.score, _BYTE) for piece in pieces[3:259]]
    vocabulary = _Vocabulary(pieces, _BPE, byte_fallback=True, collapse_spaces=False)
    return _build(vocabulary, add_bos=True, add_eos=False)


# ---- the protocol buffer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: int for varints, bytes for the rest."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, offset = _varint(data, offset)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {offset}")
        if offset + size > len(data):
            raise ValueError(f"field {number} ends {offset + size - len(data)} bytes after the end")
        yield number, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
        if shift > 63:
            raise ValueError(f"an overlong number at byte {offset}")


def _parse_model(data: bytes) -> _Vocabulary:
    found = _Vocabulary()
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is a number; expected a message")
        if number == 1:
            found.pieces.append(_parse_piece(value))
        elif number == 2:
            _parse_trainer(value, found)
        elif number == 3:
            _parse_normalizer(value, found)
    if not found.pieces:
        raise ValueError("no pieces")
    return found


def _parse_piece(data: bytes) -> _Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = value
    return _Piece(text, score, kind)


def _parse_trainer(data: bytes, found: _Vocabulary) -> None:
    roles = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(data):
        if number == 3:
            found.algorithm = value
        elif number == 24:
            found.space_after = bool(value)
        elif number == 35:
            found.byte_fallback = bool(value)
        elif number in roles:
            found.ids[roles[number]] = value


def _parse_normalizer(data: bytes, found: _Vocabulary) -> None:
    for number, value in _fields(data):
        if number == 2:
            found.character_map = value
        elif number == 3:
            found.dummy_prefix = bool(value)
        elif number == 4:
            found.collapse_spaces = bool(value)


# ---- the pipeline


def _build(vocabulary: _Vocabulary, *, add_bos: bool, add_eos: bool) -> Tokenizer:
    pieces = vocabulary.pieces
    special = {role: pieces[index].text for role, index in vocabulary.ids.items() if 0 <= index < len(pieces)}
    core = rust.Tokenizer(_model(vocabulary))
    core.normalizer = _normalizer(vocabulary)
    added = [
        rust.AddedToken(piece.text, normalized=piece.kind == _USER_DEFINED, special=piece.kind != _USER_DEFINED)
        for piece in pieces
        if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    core.add_tokens(added)
    steps = [decoders.Replace(_SPACE, " "), *([decoders.ByteFallback()] if vocabulary.byte_fallback else [])]
    steps += [decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if vocabulary.dummy_prefix else [])]
    core.decoder = decoders.Sequence(steps)
    before = [special["bos"]] if add_bos and "bos" in special else []
    after = [special["eos"]] if add_eos and "eos" in special else []
    if before or after:
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, core.token_to_id(token)) for token in {*before, *after}],
        )
    return Tokenizer(core, special=special)


def _model(vocabulary: _Vocabulary) -> models.Model:
    pieces = vocabulary.pieces
    unknown = vocabulary.ids["unk"]
    if vocabulary.algorithm == _UNIGRAM:
        # SentencePiece never finds <s> or <0x0A> in a text; the library has no types, so they are priced out instead
        never = min(piece.score for piece in pieces) - 1000.0
        found = (_NORMAL, _USER_DEFINED)
        scored = [(piece.text, piece.score if piece.kind in found else never) for piece in pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=vocabulary.byte_fallback)
    return models.BPE(
        {piece.text: index for index, piece in enumerate(pieces)},
        _merges(pieces) if vocabulary.algorithm == _BPE else [],
        unk_token=pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=vocabulary.byte_fallback,
    )


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first, as SentencePiece merges any pair with a known union.

    It breaks ties by position, which lets a run of spaces (whose pieces share one score) grow from its left end; longer
    left parts first does the same here, where ties are broken by rank.
    """
    mergeable = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _normalizer(vocabulary: _Vocabulary) -> normalizers.Normalizer:
    """Character map, spaces and the dummy prefix, in SentencePiece's order.

    It runs on each stretch of text between control tokens, which gives `<s> [INST]` the ids of Llama 2's own code. The
    library runs it on user-defined pieces too before it looks for them, so a lone one gets no prefix (which loses the
    prefix of a text that is nothing but that piece).
    """
    steps: list[normalizers.Normalizer] = []
    if vocabulary.character_map:
        steps.append(normalizers.Precompiled(vocabulary.character_map))
    if vocabulary.collapse_spaces:
        ends = rust.Regex(rf"\A +|[ {_SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(rust.Regex(" {2,}"), " ")]
    if vocabulary.dummy_prefix:
        lone = "|".join(re.escape(piece.text) for piece in vocabulary.pieces if piece.kind == _USER_DEFINED)
        prefix = normalizers.Replace(rust.Regex(rf"\A(?=[\s\S])(?!(?:{lone})\z)"), _SPACE)
        steps.append(prefix if lone else normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
