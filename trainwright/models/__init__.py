"""Language models as pure modules, from a configuration or a Hugging Face folder, and back to one."""

from __future__ import annotations

from trainwright.models.checks import check_vocabulary
from trainwright.models.decoder import Decoder
from trainwright.models.initialise import initial_value, initialise, materialize
from trainwright.models.llama import LlamaConfig
from trainwright.models.registry import ModelConfig, build_model, config_from_dict, preset, presets, replace

__all__ = [
    "Decoder",
    "LlamaConfig",
    "ModelConfig",
    "build_model",
    "check_vocabulary",
    "config_from_dict",
    "initial_value",
    "initialise",
    "materialize",
    "preset",
    "presets",
    "replace",
]
