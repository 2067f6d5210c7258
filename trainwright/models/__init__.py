"""Language models as pure modules, from a configuration or a Hugging Face folder, and back to one."""

from __future__ import annotations

from trainwright.models.attach import attach_head
from trainwright.models.backbone import Backbone
from trainwright.models.bert import BertConfig
from trainwright.models.cache import KVCache
from trainwright.models.checks import check_vocabulary
from trainwright.models.counting import (
    count_active_parameters,
    count_flops,
    count_matmul_parameters,
    count_parameters,
    visible_keys,
)
from trainwright.models.decoder import Decoder
from trainwright.models.encoder import Encoder
from trainwright.models.exporting import save_pretrained
from trainwright.models.gpt2 import GPT2Config
from trainwright.models.heads import HeadSpec
from trainwright.models.hub import load_hub
from trainwright.models.importing import Pretrained, load_config, load_pretrained
from trainwright.models.initialise import initial_value, initial_values, initialise, materialize
from trainwright.models.llama import LlamaConfig
from trainwright.models.moe import MoEConfig
from trainwright.models.registry import (
    ModelConfig,
    build_model,
    config_from_dict,
    model_plan,
    preset,
    presets,
    replace,
)
from trainwright.models.structure import ModelPlan, SplitLinear
from trainwright.models.weights import kept_tensors

__all__ = [
    "Backbone",
    "BertConfig",
    "Decoder",
    "Encoder",
    "GPT2Config",
    "HeadSpec",
    "KVCache",
    "LlamaConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelPlan",
    "Pretrained",
    "SplitLinear",
    "attach_head",
    "build_model",
    "check_vocabulary",
    "config_from_dict",
    "count_active_parameters",
    "count_flops",
    "count_matmul_parameters",
    "count_parameters",
    "initial_value",
    "initial_values",
    "initialise",
    "kept_tensors",
    "load_config",
    "load_hub",
    "load_pretrained",
    "materialize",
    "model_plan",
    "preset",
    "presets",
    "replace",
    "save_pretrained",
    "visible_keys",
]
