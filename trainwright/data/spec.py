"""What `data build` is asked for: one frozen value, from Python or from the `data` section of a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainwright.base.errors import ConfigError
from trainwright.data.documents import OnError, SourceSpec
from trainwright.data.packing import MODES

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["BuildSpec", "TrainTokenizer", "ValidationSpec", "build_spec", "default_workers", "list_sources"]


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer on the training text. A `char` tokenizer takes every character, whatever `vocab_size` says.

    `lowercase` is for `wordpiece` and `word`: letters lose case and accents.
    """

    kind: Literal["bpe", "char", "wordpiece", "word"] = "bpe"
    vocab_size: int = 8192
    min_frequency: int = 2
    lowercase: bool = False


@dataclass(frozen=True)
class ValidationSpec:
    """What is held out: a `fraction` of each source, other `sources`, or a fraction chosen by size (both None).

    A fraction is drawn by the hash of document keys. A source of fewer than 20 documents (one big text file, say)
    gives the tail of each document instead: for one file that is exactly nanoGPT's split, `text[int(n * 0.9):]`.
    """

    fraction: float | None = None
    sources: tuple[SourceSpec, ...] = ()

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError(f"the validation fraction is {self.fraction}; expected a number between 0 and 1")
        if self.fraction is not None and self.sources:
            raise ConfigError("validation has both a fraction and sources", hint="give one of the two")


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides the bytes of a dataset.

    Args:
        sources: the training text.
        weighted: draw the sources in proportion to their `weight`; False takes every document once per epoch.
        validation: what is held out, or None for no validation split.
        tokenizer: how to train one, where to load one (a path or a hub name), or a Tokenizer.
        append_eos: end each document with the end-of-text token; None does so where the tokenizer has one, unless it is
            trained on characters.
        document_mask: documents in one row do not see each other; None means: unless packing is `concat`.
    """

    sources: tuple[SourceSpec, ...]
    tokenizer: TrainTokenizer | Tokenizer | str
    sequence_length: int = 512
    packing: str = "concat"
    document_mask: bool | None = None
    validation: ValidationSpec | None = ValidationSpec()
    weighted: bool = False
    append_eos: bool | None = None
    prepend_bos: bool = False
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("a dataset needs at least one source")
        if self.packing not in MODES:
            raise ConfigError(f"packing is {self.packing!r}; expected one of {', '.join(MODES)}")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}; expected at least 2")
        labels = [source.label for source in self.sources]
        if self.weighted and len(set(labels)) < len(labels):
            raise ConfigError(
                f"two sources of the mixture have the same name: {', '.join(labels)}", hint="give each its own `name`"
            )

    @property
    def masked(self) -> bool:
        """The document mask with its default resolved."""
        return self.packing != "concat" if self.document_mask is None else self.document_mask


def default_workers() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_spec(data: Any, *, model_tokenizer: str | None = None) -> BuildSpec:
    """The BuildSpec of a recipe's `data` section (`config.data_section.DataSection`).

    `tokenizer: auto` loads `model_tokenizer` (the folder or hub name of a model that has its own), or trains
    byte-level BPE of 8192 tokens.
    """
    spec: TrainTokenizer | str
    if data.tokenizer == "auto":
        spec = model_tokenizer if model_tokenizer is not None else TrainTokenizer()
    elif getattr(data.tokenizer, "train", None) is not None:
        chosen = data.tokenizer
        if chosen.train == "char":
            spec = TrainTokenizer("char")
        else:
            lowercase = chosen.train != "bpe" and chosen.lowercase
            spec = TrainTokenizer(chosen.train, int(chosen.vocab_size), chosen.min_frequency, lowercase)
    else:
        spec = getattr(data.tokenizer, "path", None) or data.tokenizer.hf
    validation: ValidationSpec | None
    if data.validation == "none":
        validation = None
    elif data.validation == "auto":
        validation = ValidationSpec()
    elif getattr(data.validation, "fraction", None) is not None:
        validation = ValidationSpec(fraction=data.validation.fraction)
    else:
        validation = ValidationSpec(sources=list_sources(data.validation.source, data.text_field))
    return BuildSpec(
        sources=list_sources(data.source, data.text_field),
        tokenizer=spec,
        sequence_length=data.sequence_length,
        packing=data.packing,
        document_mask=None if data.document_mask == "auto" else data.document_mask,
        validation=validation,
        weighted=any(source.weight is not None for source in data.source),
        append_eos=None if data.append_eos == "auto" else data.append_eos,
        on_error=data.on_error,
    )


def list_sources(entries: Any, text_field: str) -> tuple[SourceSpec, ...]:
    """The sources of a recipe's entries; `text_field` is for those that name none."""
    return tuple(
        SourceSpec(
            source=entry.source,
            weight=1.0 if entry.weight is None else float(entry.weight),
            text_field=entry.text_field or text_field,
            name=entry.name,
        )
        for entry in entries
    )
