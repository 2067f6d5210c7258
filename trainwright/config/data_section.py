"""`data`: which texts, how they become tokens, and how tokens become rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from trainwright.base.units import Count
from trainwright.config.fields import Auto, Listed, Name, Real, Truth, Unit, Whole, Words, Written
from trainwright.config.section import Section, variant_tag

__all__ = [
    "TOKENIZERS",
    "DataSection",
    "FoldSection",
    "SourceSection",
    "TokenizerFromFolder",
    "TokenizerFromHub",
    "TrainBPE",
    "TrainCharacters",
    "TrainWordPiece",
    "TrainWords",
    "ValidationFraction",
    "ValidationSources",
    "list_sources",
]


class SourceSection(Section):
    """One source of text in a mixture."""

    source: Annotated[str, Name(what_it_is="a path, glob, folder, URL, hf://owner/name or python-stdlib")]
    """Where the text is: a file, glob or folder, any fsspec URL, hf://owner/name[:split], or python-stdlib."""
    weight: Annotated[float | None, Real((None,), above=0)] = None
    """Share of this source in the mixture, relative to the others; null takes every document once."""
    text_field: Annotated[str | None, Name((None,), what_it_is="the name of a field")] = None
    """Field or column that holds the text, for this source; null is data.text_field."""
    name: Annotated[str | None, Name((None,))] = None
    """What this source is called in counts and tables; null is the source itself."""


class FoldSection(Section):
    """One fold of a cross-validation: it is held out as validation, and the others are trained on."""

    index: Annotated[int, Whole()]
    """Number of the fold, from 0."""
    of: Annotated[int, Whole(minimum=2)]
    """How many folds there are. Records go to folds by the hash of their keys, equally many to each."""

    def problems(self) -> Any:
        if self.index >= self.of:
            yield "index", f"a number below data.fold.of, {self.of}"


@dataclass(frozen=True)
class Column(Written):
    """A column of a file."""

    @property
    def what(self) -> str:
        return "the name of a column, or its number from 0"

    def read(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise ValueError
        return value

    def json(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]}


def list_sources(value: Any) -> Any:
    """The short forms `source: a` and `source: [a, {source: b}]` as a list of sections."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources: TypeAlias = Annotated[
    tuple[SourceSection, ...],
    BeforeValidator(list_sources, json_schema_input_type=str | SourceSection | list[str | SourceSection]),
]


class ValidationFraction(Section):
    """Hold out a share of the documents."""

    fraction: Annotated[float, Real(above=0, below=1)]
    """Share of the documents that is held out, chosen by a hash of each document."""


class ValidationSources(Section):
    """Validate on other sources."""

    source: Sources
    """Texts to validate on, written as data.source."""


class _Train(Section):
    elsewhere: ClassVar[dict[str, str]] = {
        "path": "tokenizer: {path: ...}, which loads one and trains none",
        "hf": "tokenizer: {hf: ...}, which loads one and trains none",
        "vocab_size": "train: bpe, wordpiece or word (a character tokenizer has every character of the corpus)",
        "min_frequency": "train: bpe, wordpiece or word",
        "lowercase": "train: wordpiece or word",
    }


class TrainBPE(_Train):
    """Train a byte-level BPE tokenizer on the training text."""

    train: Annotated[Literal["bpe"], Words(("bpe",))]
    """bpe: byte-level byte-pair encoding, which can write every text; char: one token per character; wordpiece: BERT's
    pieces of words; word: whole words."""
    vocab_size: Annotated[Count, Unit((), Count, minimum=257)] = Count(8192)
    """Tokens of the vocabulary, special tokens included; at least 256 bytes and the end of text."""
    min_frequency: Annotated[int, Whole(minimum=1)] = 2
    """Pairs seen fewer times are not merged."""


class TrainCharacters(_Train):
    """One token per character of the corpus."""

    train: Annotated[Literal["char"], Words(("char",))]
    """bpe: byte-level byte-pair encoding, which can write every text; char: one token per character; wordpiece: BERT's
    pieces of words; word: whole words."""


class TrainWordPiece(_Train):
    """Train BERT's WordPiece on the training text."""

    train: Annotated[Literal["wordpiece"], Words(("wordpiece",))]
    """bpe: byte-level byte-pair encoding, which can write every text; char: one token per character; wordpiece: BERT's
    pieces of words; word: whole words."""
    vocab_size: Annotated[Count, Unit((), Count, minimum=16)] = Count(8192)
    """Tokens of the vocabulary, special tokens included; the text's characters are always kept."""
    min_frequency: Annotated[int, Whole(minimum=1)] = 2
    """Pairs seen fewer times are not merged."""
    lowercase: Annotated[bool, Truth()] = False
    """Letters lose their case and accents, as in BERT's uncased models."""


class TrainWords(_Train):
    """One token per word, for the most frequent words; the others are [UNK]."""

    train: Annotated[Literal["word"], Words(("word",))]
    """bpe: byte-level byte-pair encoding, which can write every text; char: one token per character; wordpiece: BERT's
    pieces of words; word: whole words."""
    vocab_size: Annotated[Count, Unit((), Count, minimum=16)] = Count(32768)
    """The most words that are kept, special tokens included."""
    min_frequency: Annotated[int, Whole(minimum=1)] = 2
    """Words seen fewer times are [UNK]."""
    lowercase: Annotated[bool, Truth()] = False
    """Letters lose their case and accents, as in BERT's uncased models."""


class TokenizerFromFolder(Section):
    """A tokenizer on disk."""

    path: Annotated[str, Name(what_it_is="a folder or a tokenizer file")]
    """A folder with tokenizer.json, the file itself, or a sentencepiece .model file."""
    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train", "hf", "vocab_size", "min_frequency", "lowercase"), "a tokenizer that is trained or named"
    )


class TokenizerFromHub(Section):
    """A tokenizer of the Hugging Face hub."""

    hf: Annotated[str, Name(what_it_is="owner/name", pattern=r"[\w.-]+(/[\w.-]+)?")]
    """The name of a model on the Hugging Face hub whose tokenizer is taken, owner/name."""
    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train", "path", "vocab_size", "min_frequency", "lowercase"), "a tokenizer that is trained or loaded"
    )


TOKENIZERS: dict[str, type[Section]] = {
    "bpe": TrainBPE,
    "char": TrainCharacters,
    "wordpiece": TrainWordPiece,
    "word": TrainWords,
    "path": TokenizerFromFolder,
    "hf": TokenizerFromHub,
}


def _tokenizer(value: Any) -> str | None:
    if isinstance(value, Mapping):
        given = [key for key in ("train", "path", "hf") if value.get(key) is not None]
        if len(given) != 1:
            return None
        kind = value["train"] if given == ["train"] else given[0]
        return variant_tag(kind) if kind in TOKENIZERS else None
    if isinstance(value, str):
        return "<auto>"
    return next((variant_tag(key) for key, cls in TOKENIZERS.items() if isinstance(value, cls)), None)


def _validation(value: Any) -> str | None:
    if isinstance(value, str):
        return "<word>"
    if isinstance(value, Mapping):
        given = [key for key in ("fraction", "source") if value.get(key) is not None]
        return variant_tag(given[0]) if len(given) == 1 else None
    if isinstance(value, ValidationFraction):
        return "<fraction>"
    return "<source>" if isinstance(value, ValidationSources) else None


Tokenizer: TypeAlias = Annotated[
    Annotated[Auto, Words(("auto",)), Tag("<auto>")]
    | Annotated[TrainBPE, Tag("<bpe>")]
    | Annotated[TrainCharacters, Tag("<char>")]
    | Annotated[TrainWordPiece, Tag("<wordpiece>")]
    | Annotated[TrainWords, Tag("<word>")]
    | Annotated[TokenizerFromFolder, Tag("<path>")]
    | Annotated[TokenizerFromHub, Tag("<hf>")],
    Discriminator(
        _tokenizer,
        custom_error_type="expected",
        custom_error_message="auto, {train: bpe | char | wordpiece | word, ...}, {path: ...} or {hf: owner/name}",
    ),
]

Validation: TypeAlias = Annotated[
    Annotated[Literal["auto", "none"], Words(("auto", "none")), Tag("<word>")]
    | Annotated[ValidationFraction, Tag("<fraction>")]
    | Annotated[ValidationSources, Tag("<source>")],
    Discriminator(
        _validation,
        custom_error_type="expected",
        custom_error_message="auto, none, {fraction: 0.02} or {source: ...}",
    ),
]


class DataSection(Section):
    """Which texts, how they become tokens, and how tokens become rows."""

    source: Sources
    """The training text: one source, or a list of sources as a mixture."""
    validation: Validation = "auto"
    """What the loss is checked on: a held-out part of the source, other sources, or none."""
    fold: FoldSection | None = None
    """Hold out one fold of the training records instead, for tasks made of records; `train --folds 5` sets it."""
    test: Sources = ()
    """Sources that the finished model is judged on, written as data.source; for tasks made of records."""
    format: Annotated[str, Name(("auto",), what_it_is="the name of a format of records", pattern=r"[\w-]+")] = "auto"
    """Format of the records, for tasks made of records; auto looks at the files."""
    columns: dict[str, Annotated[str | int, Column()]] = Field(default_factory=dict)
    """Expected name of a field: its name in the files (text: review, label: stars), or its number from 0 where they
    have no header, for tasks made of records."""
    encoding: Annotated[str, Name(what_it_is="the name of a text encoding")] = "utf-8"
    """Of text files with records (latin-1, gb18030), for tasks made of records."""
    separator: Annotated[str | None, Name((None,))] = None
    """What stands between two labels of one field, where labels are lists written as text; null where they are not."""
    names: Annotated[tuple[str, ...], Listed(item=Name(), empty=True)] = ()
    """Names of the labels or tags that the files write as numbers from 0."""
    scheme: Annotated[str, Name(("auto",), what_it_is="a scheme of tags (iob1, iob2, bioes, bmes, io, words)")] = "auto"
    """How the files mark entities on words; auto finds it over each file."""
    max_drop: Annotated[float, Real(minimum=0, maximum=1)] = 0.05
    """Largest share of the records that may give no example; more is an error. For tasks made of records."""
    max_cut: Annotated[float, Real(minimum=0, maximum=1)] = 1.0
    """Largest share of the records that may be cut to fit sequence_length; 0 refuses. For tasks made of records."""
    tokenizer: Tokenizer = "auto"
    """Load or train a tokenizer; auto takes the model's own, or trains byte-level BPE of 8192 tokens."""
    sequence_length: Annotated[int, Whole(minimum=2)] = 512
    """Tokens of a row."""
    packing: Annotated[Literal["concat", "best_fit", "pad"], Words(("concat", "best_fit", "pad"))] = "concat"
    """concat cuts one long stream; best_fit fills rows with whole documents; pad gives each document its own row.
    For tasks made of records concat is pad."""
    group_by_length: Annotated[bool, Truth()] = False
    """Rows of similar length stand in the same batch, which leaves less padding. For tasks made of records."""
    document_mask: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """Documents that share a row do not see each other; auto is true unless packing is concat."""
    append_eos: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """End every document with the end-of-text token; auto is true unless the tokenizer is trained on characters."""
    text_field: Annotated[str, Name(what_it_is="the name of a field")] = "text"
    """Field or column of jsonl, csv, parquet and arrow sources that holds the text."""
    on_error: Annotated[Literal["stop", "skip"], Words(("stop", "skip"))] = "stop"
    """A document that cannot be read stops the build, or is skipped, counted and named."""
    workers: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Processes that tokenize; auto is the CPU cores this process may use. The result does not depend on it."""
    cache: Annotated[str, Name(what_it_is="a folder")] = ".trainwright/data"
    """Folder of built token files, reused by every run with the same text, tokenizer and rows."""

    def problems(self) -> Any:
        if not self.source:
            yield "source", "at least one source"
        if self.fold is not None and self.validation != "auto":
            yield "validation", "auto beside data.fold: the fold is what is validated on"
        if self.packing == "pad" and self.document_mask is True:
            yield "document_mask", "auto or false: with packing pad no two documents share a row"
        weighted = [source for source in self.source if source.weight is not None]
        if weighted and len(weighted) != len(self.source):
            yield "source", "a weight for every source or for none"
