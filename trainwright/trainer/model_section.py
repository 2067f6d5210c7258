"""From the recipe's `model` section to a configuration: the border where names become values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trainwright.base.errors import ConfigError, ModelError
from trainwright.config import ModelFromConfig, ModelFromFolder, ModelFromPreset, ModelSection
from trainwright.config.tasks import TaskSection
from trainwright.data import holds_tokenizer
from trainwright.models import ModelConfig, check_vocabulary, load_config, preset, replace
from trainwright.models.fields import config_from_fields
from trainwright.models.hub import download
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.structure import structure
from trainwright.planner import Decision, choose_vocab_size

__all__ = ["ModelSource", "model_source", "reading_of"]

Roles = Mapping[str, int | None]

_READINGS = {"decoder": "a decoder", "encoder": "an encoder", "encoder_decoder": "an encoder-decoder"}
_ANY_VOCABULARY, _ANY_LENGTH = 1 << 16, 16  # where only the architecture is asked for
_LARGEST_VOCABULARY = 1 << 20
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before the data says how large its vocabulary must be.

    Attributes:
        make: (vocabulary size, sequence length, ids of special tokens by role) to the configuration.
        pretrained: folder with weights to load, None to start at random.
        tokenizer: the model's own tokenizer folder, None when it has none.
        vocabulary_key: recipe key of the vocabulary's size when the recipe leaves it to the planner, else None.
        decoder_start: the token that the recipe names for the beginning of what an encoder-decoder writes.
    """

    make: Callable[[int, int, Roles], ModelConfig]
    pretrained: str | None = None
    tokenizer: str | None = None
    vocabulary_key: str | None = None
    decoder_start: int | None = None

    def config_for(self, tokenizer_size: int, sequence_length: int, roles: Roles | None = None) -> ModelConfig:
        """The configuration for this tokenizer and row length.

        roles: the tokenizer's ids of "bos", "eos" and "pad" (None where it has no such token): a transformers model
            that starts at random goes by them. Without them it keeps its architecture's.

        Raises:
            ModelError: the rows are longer than the positions that the model knows, or the vocabulary does not fit.
        """
        size = int(choose_vocab_size(tokenizer_size)[0]) if self.vocabulary_key else tokenizer_size
        config = self.make(size, sequence_length, roles or {})
        check_vocabulary(config.vocab_size, tokenizer_size)
        if sequence_length > config.max_position_embeddings:
            raise ModelError(
                f"data.sequence_length {sequence_length} is longer than the {config.max_position_embeddings} positions"
                " that the model knows",
                hint=f"use data.sequence_length={config.max_position_embeddings} or a model with more positions",
            )
        return config

    def task_updates(self, section: TaskSection) -> dict[str, tuple[Any, str]]:
        """What a task leaves to the model, as updates of the recipe: whether it reads a text and writes another, and
        which token it begins with.

        Raises:
            ConfigError: the model cannot learn this task.
        """
        config = self.make(_ANY_VOCABULARY, _ANY_LENGTH, {})
        kind = reading_of(config)
        _refuse_task(section, kind, config)
        updates: dict[str, tuple[Any, str]] = {}
        if getattr(section, "architecture", None) == "auto":
            updates["task.architecture"] = (kind, "what the model is")
        if getattr(section, "decoder_start", None) == "auto" and kind == "encoder_decoder":
            assert isinstance(config, HuggingFaceConfig), "native families are decoders and encoders"
            named = config.decoder_start_id if self.pretrained is not None else self.decoder_start
            if named is not None:
                updates["task.decoder_start"] = (named, "decoder_start_token_id of the model")
        return updates

    def decisions(self, config: ModelConfig, tokenizer_size: int) -> tuple[Decision, ...]:
        """The vocabulary's size as a decision, where it was one."""
        if self.vocabulary_key is None:
            return ()
        return (Decision(self.vocabulary_key, config.vocab_size, choose_vocab_size(tokenizer_size)[1]),)


def reading_of(config: ModelConfig) -> Literal["decoder", "encoder", "encoder_decoder"]:
    """How a model reads: forwards only, both ways, or both ways and then writing."""
    if not isinstance(config, HuggingFaceConfig):
        return "encoder" if config.family == "bert" else "decoder"
    if config.kind == "seq2seq":
        return "encoder_decoder"
    return "decoder" if config.kind == "causal_lm" else "encoder"


def _refuse_task(section: TaskSection, kind: str, config: ModelConfig) -> None:
    """Language modelling tasks need the attention that they were made for; heads of labels stand on any model."""
    wanted = {"causal_lm": ("decoder",), "sft": ("decoder",), "masked_lm": ("encoder",)}
    written = ("decoder", "encoder_decoder")
    fitting = wanted.get(section.name, written if getattr(section, "architecture", None) is not None else (kind,))
    named = getattr(section, "architecture", "auto")
    if kind not in fitting or named not in ("auto", kind):
        raise ConfigError(
            f"task {section.name} needs {' or '.join(_READINGS[name] for name in fitting if named in ('auto', name))},"
            f" and this model ({config.to_hf()['architectures'][0]}) is {_READINGS[kind]}",
            hint="choose another model, or a task that fits it",
        )


def model_source(section: ModelSection) -> ModelSource:
    """Read the section; folders and hub names are opened here, so a wrong one fails before any work is done."""
    dropout = {} if section.dropout is None else {"dropout": section.dropout}
    if isinstance(section, ModelFromPreset):
        return _from_preset(section, dropout)
    if isinstance(section, ModelFromConfig):
        return _from_fields(section.config, dropout)
    folder = Path(section.path) if isinstance(section, ModelFromFolder) else download(section.hf)
    native = section.implementation == "native"
    config = _with_dropout(load_config(folder, native=native), dropout)
    return ModelSource(
        make=lambda vocabulary, length, roles: config,
        pretrained=str(folder) if section.init_from_pretrained else None,
        tokenizer=str(folder) if holds_tokenizer(folder) else None,
    )


def _from_preset(section: ModelFromPreset, dropout: dict[str, float]) -> ModelSource:
    base = _with_dropout(preset(section.preset, **section.overrides), dropout)
    auto = section.vocab_size == "auto"

    def make(vocabulary: int, length: int, roles: Roles) -> ModelConfig:
        positions = max(base.max_position_embeddings, length)
        size = vocabulary if auto else int(section.vocab_size)
        return replace(base, vocab_size=size, max_position_embeddings=positions)

    return ModelSource(make=make, vocabulary_key="model.vocab_size" if auto else None)


def _from_fields(given: dict[str, Any], dropout: dict[str, float]) -> ModelSource:
    theirs = given.get("family") == "transformers"
    auto = not any(name in given for name in ("vocab_size", *(("values",) if theirs else ())))

    def make(vocabulary: int, length: int, roles: Roles) -> ModelConfig:
        sized = {"vocab_size": vocabulary} if auto else {}
        if theirs:
            config = config_from_fields(_with_special({**given, **sized}, roles))
            return _with_dropout(_positions_for(config, length), dropout)
        filled = {"max_position_embeddings": length, **given, **sized}
        return _with_dropout(config_from_fields(filled), dropout)

    return ModelSource(
        make=make,
        vocabulary_key="model.config.vocab_size" if auto else None,
        decoder_start=given.get("decoder_start_token_id"),
    )


def _with_special(given: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """An architecture's numbers of special tokens are those of its own tokenizer. The ones that the recipe does not
    name become this tokenizer's with the same role; without roles, those beyond the vocabulary are left out."""
    known = config_from_fields({**given, "vocab_size": max(int(given.get("vocab_size", 0)), _LARGEST_VOCABULARY)})
    assert isinstance(known, HuggingFaceConfig)
    words = int(given.get("vocab_size", known.vocab_size))
    theirs = {role: known.values.get(f"{role}_token_id") for role in ("pad", "eos", "bos")}
    filled = dict(given)
    for name, value in known.values.items():
        if not name.endswith("_token_id") or name in given or not isinstance(value, int):
            continue
        role = next((role for role, number in theirs.items() if number == value), None)
        if role is not None and role in roles and (roles[role] is not None or not structure(known).first_position):
            filled[name] = roles[role]
        elif value >= words:
            filled[name] = None if _may_lack(given, name) else roles.get("pad") or 0
    if known.kind == "seq2seq" and roles and "decoder_start_token_id" not in given:
        filled["decoder_start_token_id"] = roles["pad"] if roles["pad"] is not None else roles["eos"]
    return filled


def _may_lack(given: Mapping[str, Any], name: str) -> bool:
    """Whether the architecture's configuration takes null for the field."""
    try:
        config_from_fields({**given, "vocab_size": _LARGEST_VOCABULARY, name: None})
    except ModelError:
        return False
    return True


def _positions_for(config: ModelConfig, length: int) -> ModelConfig:
    """With as many learned positions as rows have, where the recipe leaves fewer to the architecture's default."""
    assert isinstance(config, HuggingFaceConfig)
    lacking = length - config.max_position_embeddings
    name = next((name for name in _POSITION_FIELDS if isinstance(config.values.get(name), int)), None)
    return config if lacking <= 0 or name is None else config.with_values({name: config.values[name] + lacking})


def _with_dropout(config: ModelConfig, dropout: dict[str, float]) -> ModelConfig:
    """Set every dropout probability that the family has."""
    if not dropout:
        return config
    if isinstance(config, HuggingFaceConfig):
        return config.with_dropout(dropout["dropout"])
    names = [field.name for field in fields(config) if field.name.endswith("dropout")]
    return replace(config, **dict.fromkeys(names, dropout["dropout"]))
