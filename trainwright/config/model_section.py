"""`model`: a named size, a folder, a Hugging Face name, or a configuration written out. Exactly one of the four."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, JsonValue, Tag

from trainwright.base.units import Count
from trainwright.config.fields import Auto, Name, Real, Truth, Unit, Words
from trainwright.config.section import Section, variant_tag

__all__ = [
    "MODEL_SOURCES",
    "Attention",
    "ModelFromConfig",
    "ModelFromFolder",
    "ModelFromHub",
    "ModelFromPreset",
    "ModelSection",
]

Attention: TypeAlias = Literal["auto", "sdpa", "blocked", "grouped", "flex", "reference"]

_WHERE = {
    "preset": "model.preset",
    "path": "model.path",
    "hf": "model.hf",
    "config": "model.config",
    "overrides": "model.preset",
    "init_from_pretrained": "model.path and model.hf",
    "implementation": "model.path and model.hf (in model.config write family: transformers)",
    "vocab_size": "model.preset (inside model.config write it as a field)",
}


class _Model(Section):
    elsewhere: ClassVar[dict[str, str]] = _WHERE
    own_keys_first: ClassVar[bool] = True

    dropout: Annotated[float | None, Real((None,), minimum=0, below=1)] = None
    """Dropout probability where the family has dropout; null keeps what the preset, folder or config says."""
    attention: Annotated[Attention, Words(("auto", "sdpa", "blocked", "grouped", "flex", "reference"))] = "auto"
    """Attention implementation; auto takes the fastest one for the device and shape."""


class ModelFromPreset(_Model):
    """A named size, initialised at random."""

    preset: Annotated[str, Name(what_it_is="the name of a preset, such as llama-15m")]
    """A named size of a family, such as llama-15m or gpt2."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the family's configuration that replace the preset's, such as {num_layers: 4}."""
    vocab_size: Annotated[Count | Auto, Unit(("auto",), Count, minimum=1)] = "auto"
    """Rows of the embedding; auto is the tokenizer's size, rounded up where that is faster."""


class ModelFromFolder(_Model):
    """A Hugging Face model folder on disk."""

    path: Annotated[str, Name(what_it_is="a folder")]
    """A Hugging Face model folder: config.json and safetensors files."""
    init_from_pretrained: Annotated[bool, Truth()] = True
    """Load the weights; false takes the architecture only and initialises at random."""
    implementation: Annotated[Literal["native", "transformers"], Words(("native", "transformers"))] = "native"
    """Whose modules: native takes our own family where the architecture has one, else those of transformers."""


class ModelFromHub(_Model):
    """A model of the Hugging Face hub."""

    hf: Annotated[str, Name(what_it_is="owner/name", pattern=r"[\w.-]+(/[\w.-]+)?")]
    """The name of a model on the Hugging Face hub, owner/name."""
    init_from_pretrained: Annotated[bool, Truth()] = True
    """Load the weights; false takes the architecture only and initialises at random."""
    implementation: Annotated[Literal["native", "transformers"], Words(("native", "transformers"))] = "native"
    """Whose modules: native takes our own family where the architecture has one, else those of transformers."""


class ModelFromConfig(_Model):
    """A configuration written out field by field, initialised at random."""

    config: dict[str, JsonValue]
    """{family: llama, gpt2, moe, bert or transformers, and any field of that family's configuration}; the family
    transformers takes the fields of a config.json, `model_type` among them."""

    def problems(self) -> Any:
        if not isinstance(self.config.get("family"), str):
            yield "config", "a field `family` (llama, gpt2, moe, bert or transformers) among the fields of model.config"


MODEL_SOURCES: dict[str, type[_Model]] = {
    "preset": ModelFromPreset,
    "path": ModelFromFolder,
    "hf": ModelFromHub,
    "config": ModelFromConfig,
}


def _source(value: Any) -> str | None:
    if isinstance(value, Mapping):
        given = [key for key in MODEL_SOURCES if value.get(key) is not None]
        return variant_tag(given[0]) if len(given) == 1 else None
    return next((variant_tag(key) for key, cls in MODEL_SOURCES.items() if isinstance(value, cls)), None)


ModelSection: TypeAlias = Annotated[
    Annotated[ModelFromPreset, Tag("<preset>")]
    | Annotated[ModelFromFolder, Tag("<path>")]
    | Annotated[ModelFromHub, Tag("<hf>")]
    | Annotated[ModelFromConfig, Tag("<config>")],
    Discriminator(
        _source,
        custom_error_type="expected",
        custom_error_message="exactly one of the keys preset, path, hf, config",
    ),
]
