"""A model of any architecture of transformers as one frozen value: its `config.json`, and what the model is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.head_files import KEY, head_from_hf
from trainwright.models.heads import HeadSpec, check_head, head_fields
from trainwright.models.hugging_face.library import (
    class_for,
    has_class,
    hf_config,
    kind_for,
    make_hf_config,
    stored_fields,
)

__all__ = ["UNLIMITED", "HuggingFaceConfig"]

UNLIMITED = 1 << 20
"""Positions of an architecture that computes them and names no limit."""

_DROPOUT = ("dropout", "pdrop", "dropout_prob", "dropout_rate")
_PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class HuggingFaceConfig:
    """One transformers model.

    Attributes:
        values: the fields of its `config.json`; those that are not given get the architecture's defaults.
        kind: what it is for without a head, a name of `library.KINDS`; empty takes what `architectures` or the
            architecture says.
        head: what stands on the trunk in place of the language-model head.
    """

    values: Mapping[str, Any]
    kind: str = ""
    head: HeadSpec | None = None

    def __post_init__(self) -> None:
        check_head(self.head)
        full = stored_fields(make_hf_config(self.values))
        object.__setattr__(self, "values", full)
        if full.get("is_encoder_decoder") and self.decoder_start_id is not None:
            full["decoder_start_token_id"] = self.decoder_start_id  # which classes read, and configurations may lack
        if not self.kind:
            object.__setattr__(self, "kind", kind_for(full))
        class_for(self.hf, self.class_kind)

    def __hash__(self) -> int:
        return hash((self._text, self.kind, self.head))

    def __getattr__(self, name: str) -> Any:
        """Fields of transformers' own configuration, for code that knows only that one."""
        if name.startswith("__") or "values" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.hf, name)

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> HuggingFaceConfig:
        """From fields of this class, or of `config.json` side by side with `kind`; `head` is a HeadSpec or None."""
        own = {field.name for field in fields(cls)}
        inner = {key: value for key, value in given.items() if key not in own}
        values = {**dict(given.get("values") or {}), **inner}
        if not values.get("model_type"):
            raise ModelError(
                "a transformers configuration needs model_type, such as phi or t5",
                hint="write the fields of a config.json: {family: transformers, model_type: phi, hidden_size: 64, ...}",
            )
        return cls(values, str(given.get("kind") or ""), given.get("head"))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> HuggingFaceConfig:
        """From a parsed `config.json`; ModelError where transformers does not know or refuses it."""
        return cls({key: value for key, value in values.items() if key != KEY}, head=head_from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model."""
        written: dict[str, Any] = json.loads(self.hf.to_json_string(use_diff=True))
        for key in _GENERATION:
            written.setdefault(key, self.values.get(key))
        written["architectures"] = [self.model_class.__name__]
        if self.head is not None:
            written[KEY] = head_fields(self.head)
        return written

    def with_values(self, changes: Mapping[str, Any]) -> HuggingFaceConfig:
        """A copy with some fields of `config.json` changed."""
        inside = dict(self.values)
        for key, value in changes.items():
            inside[self.hf.attribute_map.get(key, key)] = value
        return HuggingFaceConfig(inside, self.kind, self.head)

    def with_dropout(self, probability: float) -> HuggingFaceConfig:
        """A copy with every dropout probability of the architecture set."""
        names = [
            name
            for name, value in self.values.items()
            if name.endswith(_DROPOUT) and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return self.with_values(dict.fromkeys(names, probability))

    @property
    def family(self) -> str:
        return "transformers"

    @property
    def hf(self) -> Any:
        """The configuration object of transformers; shared, so nobody may change it."""
        return hf_config(self._text)

    @cached_property
    def _text(self) -> str:
        return json.dumps({**self.values, **self.head_values()}, sort_keys=True)

    def head_values(self) -> dict[str, Any]:
        """What the head writes into `config.json`."""
        if self.head is None or self.head.kind in ("embedding", "entities"):
            return {}
        values: dict[str, Any] = {}
        if "classifier_dropout" in self.values:
            values["classifier_dropout"] = self.head.dropout
        if self.head.kind == "span":
            return {**values, "num_labels": 2}
        values["id2label"] = {str(number): label for number, label in enumerate(self.head.labels)}
        values["label2id"] = {label: number for number, label in enumerate(self.head.labels)}
        if self.head.kind == "sequence":
            values["problem_type"] = _PROBLEMS[self.head.problem]
        return values

    @cached_property
    def class_kind(self) -> str:
        """Of which kind the class of transformers is; heads that it has none for stand on its bare trunk."""
        if self.head is None:
            return self.kind
        usual = self.head.kind != "sequence" or self.head.pooling == "auto"
        if self.head.kind in ("sequence", "token", "span") and usual and has_class(self._plain, self.head.kind):
            return self.head.kind
        return "text_encoder" if bool(getattr(self._plain, "is_encoder_decoder", False)) else "encoder"

    @property
    def _plain(self) -> Any:
        return hf_config(json.dumps(self.values, sort_keys=True))

    @property
    def model_class(self) -> type[Any]:
        """The class of transformers."""
        return class_for(self.hf, self.class_kind)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.hf, "is_encoder_decoder", False))

    @property
    def _text_config(self) -> Any:
        return self.hf.get_text_config()

    def _number(self, *names: str, default: int = 0) -> int:
        for holder in (self._text_config, self.hf):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    @property
    def vocab_size(self) -> int:
        return self._number("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self._number("hidden_size", "d_model", "n_embd", "dim")

    @property
    def num_heads(self) -> int:
        return self._number("num_attention_heads", "num_heads", "n_head", default=1)

    @property
    def num_kv_heads(self) -> int:
        return self._number("num_key_value_heads", default=self.num_heads)

    @property
    def head_dim(self) -> int:
        return self._number("head_dim", "d_kv", default=max(1, self.hidden_size // max(1, self.num_heads)))

    @property
    def intermediate_size(self) -> int:
        return self._number("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", default=4 * self.hidden_size)

    @property
    def num_layers(self) -> int:
        """Blocks, those of encoder and decoder together."""
        encoder = self._number("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", default=1)
        if not self.is_encoder_decoder:
            return encoder
        return encoder + self._number("decoder_layers", "num_decoder_layers", default=encoder)

    @property
    def max_position_embeddings(self) -> int:
        """Positions that a row may have."""
        found = self._number("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", default=UNLIMITED)
        if found == UNLIMITED:
            return found
        from trainwright.models.hugging_face.structure import structure

        return found - structure(self).first_position

    @property
    def initializer_range(self) -> float:
        """Of a head of ours; the trunk has the rules of its architecture."""
        found = (getattr(self._text_config, name, None) for name in ("initializer_range", "init_std"))
        return next((float(value) for value in found if isinstance(value, float)), 0.02)

    @property
    def tie_embeddings(self) -> bool:
        return bool(getattr(self.hf, "tie_word_embeddings", False))

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        eos = self.values.get("eos_token_id")
        return tuple(eos) if isinstance(eos, list) else eos

    @property
    def decoder_start_id(self) -> int | None:
        """The token before the first one of an encoder-decoder: named, else that of beginnings, padding, ends."""
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
        found = (self.values.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    def layer_windows(self) -> list[int | None]:
        """The sliding window of each layer in tokens, or None where it sees everything before."""
        window = self._number("sliding_window", default=0) or None
        kinds = getattr(self._text_config, "layer_types", None)
        if kinds is None or self.is_encoder_decoder:
            used = window is not None and getattr(self._text_config, "use_sliding_window", True)
            return [window if used else None] * self.num_layers
        return [window if kind == "sliding_attention" else None for kind in kinds]
