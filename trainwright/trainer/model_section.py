"""From the recipe's `model` section to a configuration: the border where names become values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.config import ModelFromConfig, ModelFromFolder, ModelFromPreset, ModelSection
from trainwright.models import ModelConfig, check_vocabulary, load_config, preset, replace
from trainwright.models.fields import config_from_fields
from trainwright.models.hub import download
from trainwright.planner import Decision, choose_vocab_size

__all__ = ["ModelSource", "model_source"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before the data says how large its vocabulary must be.

    Attributes:
        make: (vocabulary size, sequence length) to the configuration.
        pretrained: folder with weights to load, None to start at random.
        tokenizer: the model's own tokenizer folder, None when it has none.
        vocabulary_key: recipe key of the vocabulary's size when the recipe leaves it to the planner, else None.
    """

    make: Callable[[int, int], ModelConfig]
    pretrained: str | None = None
    tokenizer: str | None = None
    vocabulary_key: str | None = None

    def config_for(self, tokenizer_size: int, sequence_length: int) -> ModelConfig:
        """The configuration for this tokenizer and row length.

        Raises:
            ModelError: the rows are longer than the positions that the model knows, or the vocabulary does not fit.
        """
        size = int(choose_vocab_size(tokenizer_size)[0]) if self.vocabulary_key else tokenizer_size
        config = self.make(size, sequence_length)
        check_vocabulary(config.vocab_size, tokenizer_size)
        if sequence_length > config.max_position_embeddings:
            raise ModelError(
                f"data.sequence_length {sequence_length} is longer than the {config.max_position_embeddings} positions"
                " that the model knows",
                hint=f"use data.sequence_length={config.max_position_embeddings} or a model with more positions",
            )
        return config

    def decisions(self, config: ModelConfig, tokenizer_size: int) -> tuple[Decision, ...]:
        """The vocabulary's size as a decision, where it was one."""
        if self.vocabulary_key is None:
            return ()
        return (Decision(self.vocabulary_key, config.vocab_size, choose_vocab_size(tokenizer_size)[1]),)


def model_source(section: ModelSection) -> ModelSource:
    """Read the section; folders and hub names are opened here, so a wrong one fails before any work is done."""
    dropout = {} if section.dropout is None else {"dropout": section.dropout}
    if isinstance(section, ModelFromPreset):
        return _from_preset(section, dropout)
    if isinstance(section, ModelFromConfig):
        return _from_fields(section.config, dropout)
    folder = Path(section.path) if isinstance(section, ModelFromFolder) else download(section.hf)
    config = _with_dropout(load_config(folder), dropout)
    has_tokenizer = any((folder / name).exists() for name in _TOKENIZER_FILES)
    return ModelSource(
        make=lambda vocabulary, length: config,
        pretrained=str(folder) if section.init_from_pretrained else None,
        tokenizer=str(folder) if has_tokenizer else None,
    )


def _from_preset(section: ModelFromPreset, dropout: dict[str, float]) -> ModelSource:
    base = _with_dropout(preset(section.preset, **section.overrides), dropout)
    auto = section.vocab_size == "auto"

    def make(vocabulary: int, length: int) -> ModelConfig:
        positions = max(base.max_position_embeddings, length)
        size = vocabulary if auto else int(section.vocab_size)
        return replace(base, vocab_size=size, max_position_embeddings=positions)

    return ModelSource(make=make, vocabulary_key="model.vocab_size" if auto else None)


def _from_fields(given: dict[str, Any], dropout: dict[str, float]) -> ModelSource:
    auto = "vocab_size" not in given

    def make(vocabulary: int, length: int) -> ModelConfig:
        filled = {"max_position_embeddings": length, **given, **({"vocab_size": vocabulary} if auto else {})}
        return _with_dropout(config_from_fields(filled), dropout)

    return ModelSource(make=make, vocabulary_key="model.config.vocab_size" if auto else None)


def _with_dropout(config: ModelConfig, dropout: dict[str, float]) -> ModelConfig:
    """Set every dropout probability that the family has."""
    if not dropout:
        return config
    names = [field.name for field in fields(config) if field.name.endswith("dropout")]
    return replace(config, **dict.fromkeys(names, dropout["dropout"]))
