"""The one table from names to families: configuration classes, modules, presets and plans."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainwright.base.errors import ModelError
from trainwright.models.attach import attach_head
from trainwright.models.backbone import Backbone
from trainwright.models.bert.config import BERT_ARCHITECTURES, BertConfig
from trainwright.models.bert.model import BertForMaskedLM
from trainwright.models.bert.plan import plan as bert_plan
from trainwright.models.bert.presets import BERT_PRESETS
from trainwright.models.bert.weights import BERT_WEIGHTS
from trainwright.models.gpt2.config import GPT2Config
from trainwright.models.gpt2.model import GPT2LMHeadModel
from trainwright.models.gpt2.plan import plan as gpt2_plan
from trainwright.models.gpt2.presets import GPT2_PRESETS
from trainwright.models.gpt2.weights import GPT2_WEIGHTS
from trainwright.models.head_files import head_from_hf
from trainwright.models.heads import head_module_name
from trainwright.models.hugging_face.build import build_hugging_face
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.library import is_known
from trainwright.models.hugging_face.plan import plan as hugging_face_plan
from trainwright.models.hugging_face.weights import HUGGING_FACE_WEIGHTS
from trainwright.models.initialise import materialize
from trainwright.models.llama.config import ARCHITECTURES, LlamaConfig
from trainwright.models.llama.model import LlamaForCausalLM
from trainwright.models.llama.plan import plan as llama_plan
from trainwright.models.llama.presets import LLAMA_PRESETS
from trainwright.models.llama.weights import LLAMA_WEIGHTS
from trainwright.models.moe.config import MOE_ARCHITECTURES, MoEConfig
from trainwright.models.moe.model import MoEForCausalLM
from trainwright.models.moe.plan import plan as moe_plan
from trainwright.models.moe.presets import MOE_PRESETS
from trainwright.models.moe.weights import MOE_WEIGHTS
from trainwright.models.structure import ModelPlan
from trainwright.models.weights import WeightFormat

__all__ = [
    "FAMILIES",
    "Family",
    "ModelConfig",
    "build_model",
    "config_from_dict",
    "family_of",
    "model_plan",
    "preset",
    "presets",
    "replace",
]

ModelConfig = LlamaConfig | GPT2Config | MoEConfig | BertConfig | HuggingFaceConfig


@dataclass(frozen=True)
class Family:
    """Everything the house needs to know of one model family."""

    name: str
    model_types: tuple[str, ...]
    config_class: type[Any]
    model_class: Callable[[Any], Backbone]
    presets: Mapping[str, Any]
    plan: Callable[[Any], ModelPlan]
    weights: WeightFormat


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", ARCHITECTURES, LlamaConfig, LlamaForCausalLM, LLAMA_PRESETS, llama_plan, LLAMA_WEIGHTS),
    "gpt2": Family("gpt2", ("gpt2",), GPT2Config, GPT2LMHeadModel, GPT2_PRESETS, gpt2_plan, GPT2_WEIGHTS),
    "bert": Family("bert", BERT_ARCHITECTURES, BertConfig, BertForMaskedLM, BERT_PRESETS, bert_plan, BERT_WEIGHTS),
    "moe": Family("moe", MOE_ARCHITECTURES, MoEConfig, MoEForCausalLM, MOE_PRESETS, moe_plan, MOE_WEIGHTS),
    # Every architecture of transformers that no other family has.
    "transformers": Family(
        "transformers", (), HuggingFaceConfig, build_hugging_face, {}, hugging_face_plan, HUGGING_FACE_WEIGHTS
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return FAMILIES[config.family]


def model_plan(config: ModelConfig) -> ModelPlan:
    """Where the parts of a model are, as plain data."""
    plan = family_of(config).plan(config)
    if config.head is None or isinstance(config, HuggingFaceConfig):
        return plan
    head = head_module_name(config.to_hf()["model_type"], config.head.kind)
    return dataclasses.replace(plan, head=head, tied=(), head_rest=())


def presets() -> dict[str, ModelConfig]:
    """Every named size, smallest family members first."""
    return {name: config for family in FAMILIES.values() for name, config in family.presets.items()}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A named size with some fields replaced, e.g. `preset("llama-34m", vocab_size=512)`.

    Raises:
        ModelError: no such preset or field (with the nearest names), or values that do not fit together.
    """
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ModelError(
            f"no preset is called {name!r}",
            hint=f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}",
        )
    return replace(known[name], **overrides)


def replace(config: ModelConfig, **overrides: Any) -> ModelConfig:
    """A copy of `config` with fields replaced; ModelError for a field it does not have."""
    refuse_unknown_fields(family_of(config), overrides)
    return dataclasses.replace(config, **overrides)


def refuse_unknown_fields(family: Family, names: Iterable[str]) -> None:
    """ModelError, with the nearest name, for the first that is no field of the family's configuration."""
    fields = [field.name for field in dataclasses.fields(family.config_class)]
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ModelError(
                f"a {family.name} model has no field {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"fields: {', '.join(fields)}",
            )


def config_from_dict(values: Mapping[str, Any], *, native: bool = True) -> ModelConfig:
    """A configuration from a parsed Hugging Face `config.json`.

    native: of our own family where there is one for the architecture; else, and without it, transformers' own modules.

    Raises:
        ModelError: the architecture is unknown, asks for a feature that is not supported, or brings its own code.
    """
    model_type = values.get("model_type")
    if values.get("auto_map"):
        raise ModelError(
            f"model_type {model_type!r} brings its own Python code (auto_map: {values['auto_map']}); it is never run",
            hint="convert the model to a standard architecture with transformers first",
        )
    if values.get("quantization_config"):
        method = dict(values["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"the weights are quantised ({method}), which is not supported", hint="use the unquantised model"
        )
    for family in FAMILIES.values():
        if native and model_type in family.model_types:
            config: ModelConfig = family.config_class.from_hf(dict(values))
            return dataclasses.replace(config, head=head_from_hf(values))
    if is_known(model_type):
        return HuggingFaceConfig.from_hf(values)
    hint = f"known: {', '.join(name for family in FAMILIES.values() for name in family.model_types)}"
    if importlib.util.find_spec("transformers") is None:
        hint += "; with transformers all that it knows: pip install 'trainwright[transformers]'"
    raise ModelError(f"unknown architecture: model_type={model_type!r}", hint=hint)


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Backbone:
    """A model with initial weights, in training mode. device="meta" gives shapes only: see `materialize`.

    The weights are a pure function of (config, seed): device, layout and call order do not change them.
    """
    with torch.device("meta"):
        model = family_of(config).model_class(config).to(dtype)
        if config.head is not None:
            attach_head(model, config.head)
    return model if torch.device(device).type == "meta" else materialize(model, device, seed)
