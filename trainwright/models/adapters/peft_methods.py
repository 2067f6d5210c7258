"""Any other method of peft (IA3, OFT, LoHa, ...) in a transformers model.

peft exchanges modules and draws first values as it does, so the model must have its weights when a method is put in:
every process holds it whole for that moment, in host memory. What peft makes is divided by ZeRO like any module. The
methods that this project has itself (`apply_adapter`) need neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright.base.errors import ConfigError, MissingDependencyError, ModelError
from trainwright.base.seeds import derive_seed
from trainwright.models.adapters.saving import ADAPTER_CONFIG, ADAPTER_WEIGHTS, source_of
from trainwright.models.adapters.targets import head_parameters
from trainwright.models.backbone import Backbone
from trainwright.models.exporting import WeightSource

__all__ = ["PeftReport", "apply_peft_method", "inject_peft_method", "merge_peft_method", "save_peft_method"]

_OWN = {"LORA": "lora, rslora, dora or qlora"}
_NEEDS_TASKS = ("POLY",)
_NAME = "default"


@dataclass(frozen=True)
class PeftReport:
    """What peft made of a model: its method, and how many of its parameters (numbers) are trained."""

    method: str
    trained: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.method} of peft: {self.trained:,} of {self.total:,} parameters are trained"
            f" ({self.trained / max(1, self.total):.2%})"
        )


def apply_peft_method(model: nn.Module, config: Mapping[str, Any], *, seed: int = 0) -> PeftReport:
    """Put a method of peft into a transformers model that has its weights, in place; freeze all but it and the task's
    head.

    The same seed gives the same first values on every process. Names of parameters become those of peft
    (`q_proj.base_layer.weight`).

    Args:
        config: fields of peft's configuration, `peft_type` among them.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: an unknown method or field, one that is not a part of modules (prompts), or one of our own.
        ModelError: a native family, or a model on the meta device.
    """
    if isinstance(model, Backbone):
        raise ModelError(
            f"{type(model).__name__} is a native family, whose modules peft does not know",
            hint="use adapter lora, rslora, dora or qlora; or train the folder as a transformers model:"
            " model.config {family: transformers, ...}",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("peft needs a model that has its weights, and this one is on the meta device")
    method = inject_peft_method(model, config, seed=seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return PeftReport(method, trained, sum(parameter.numel() for parameter in model.parameters()))


def inject_peft_method(model: nn.Module, config: Mapping[str, Any], *, seed: int = 0) -> str:
    """What `apply_peft_method` does to modules, on the meta device too, where they get shapes alone; returns the
    method's name."""
    peft = _peft()
    method, made = _configuration(peft, config)
    of_head = head_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "peft"))
        try:
            peft.inject_adapter_in_model(made, model, adapter_name=_NAME)
        except (ValueError, TypeError) as error:  # methods with state that modules share are refused here as well
            raise ConfigError(
                f"peft cannot put {method} into {type(model).__name__}: {error}",
                hint="other methods, or other adapter.config.target_modules, may fit",
            ) from error
    for parameter in of_head.values():
        parameter.requires_grad_(True)
    return method


def save_peft_method(
    model: nn.Module, folder: str | Path, *, source: WeightSource | None = None, base: str | None = None
) -> Path:
    """Write what peft reads: adapter_config.json and adapter_model.safetensors; returns the folder.

    Args:
        source: gives the parameters of a divided model (`readable_weights`); None reads the model's own.
        base: the folder or name of the model that it belongs to.
    """
    from safetensors.torch import save_file

    peft = _peft()
    source = source or source_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: source.read(name, 0, source.shapes[name][0]).cpu() for name in source.shapes if name in trained}
    # What a method keeps and never trains stands in buffers.
    state |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name not in state}
    found = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=_NAME)
    found |= {name: state[name] for name in head_parameters(model) if name in state}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made: Any = model.__dict__["peft_config"][_NAME]
    values = {**made.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    values["peft_type"] = str(getattr(values["peft_type"], "value", values["peft_type"]))
    text = json.dumps(values, indent=2, ensure_ascii=False, default=lambda value: sorted(value)) + "\n"
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in found.items()}
    save_file(tensors, folder / f".{ADAPTER_WEIGHTS}.tmp", metadata={"format": "pt"})
    os.replace(folder / f".{ADAPTER_WEIGHTS}.tmp", folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return folder


def merge_peft_method(model: nn.Module) -> nn.Module:
    """Make what a method has trained part of the weights, in place, as peft's `merge_and_unload` does; returns the
    model, whose parameters have their own names again and can be trained.

    Raises:
        ModelError: the method cannot be merged.
    """
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        try:
            module.merge()
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"peft cannot merge {type(module).__name__}: {error}", hint="use adapter/") from error
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    model.__dict__.pop("peft_config", None)
    return model.requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("adapter peft needs peft", hint="pip install 'trainwright[peft]'") from error
    return peft


def _configuration(peft: Any, config: Mapping[str, Any]) -> tuple[str, Any]:
    """(method, configuration object of peft)."""
    values = dict(config)
    method = str(values.pop("peft_type", ""))
    known = {str(kind.value): cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    injected = sorted(
        str(kind.value)
        for kind in peft.PEFT_TYPE_TO_TUNER_MAPPING
        if not issubclass(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind], peft.PromptLearningConfig)
    )
    if method in _OWN:
        raise ConfigError(f"peft_type {method} is a method of our own", hint=f"use adapter.name {_OWN[method]}")
    if method not in known:
        raise ConfigError(f"peft_type {method!r} is not one of {', '.join(sorted(known))}")
    if method in _NEEDS_TASKS:
        raise ConfigError(f"peft_type {method} needs the number of a task with every batch, which batches here lack")
    if method not in injected:
        raise ConfigError(
            f"peft_type {method} is not a part of the model's modules", hint="methods that are: " + ", ".join(injected)
        )
    try:
        return method, known[method](**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter.config for {method}: {error}") from error
