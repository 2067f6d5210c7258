"""From a configuration to a model of transformers that is a `HuggingFaceModel` too, and from one head to another."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch

from trainwright.models.heads import HeadSpec
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.heads import add_own_head, head_module_of
from trainwright.models.hugging_face.inputs import accepted_names
from trainwright.models.hugging_face.library import TRUNKS
from trainwright.models.hugging_face.model import HuggingFaceModel
from trainwright.models.hugging_face.structure import build_module, structure

__all__ = ["build_hugging_face", "swap_head"]


def build_hugging_face(config: HuggingFaceConfig) -> Any:
    """The model of a configuration: parameters on the meta device, tables on the CPU."""
    model, _ = build_module(config)
    kind: Any = type(model)
    model.__dict__["accepted"] = accepted_names(kind)
    model.__dict__["first_position"] = structure(config).first_position
    model.__dict__["projection_name"] = _projection_name(model, config)
    model.__dict__["own_config"], model.config = model.config, config
    model.__class__ = _mixed_class(kind)
    if config.head is not None:
        add_own_head(model, config.head, on_trunk=config.class_kind in TRUNKS)
    return model


def _projection_name(model: Any, config: HuggingFaceConfig) -> str | None:
    """The module that makes logits, or the scores of a task; None on a bare trunk."""
    if config.class_kind in TRUNKS:
        return None
    if config.head is not None:
        return head_module_of(model)
    projection = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is projection), None)


@cache
def _mixed_class(kind: Any) -> Any:
    return type(kind.__name__, (HuggingFaceModel, kind), {"__module__": kind.__module__})


@torch.no_grad()
def swap_head(model: Any, spec: HeadSpec, *, seed: int) -> Any:
    """Put another head on a model, in place: it becomes the class of transformers for it, with the same trunk."""
    if model.config.head == spec:
        return model
    from trainwright.models.initialise import initial_value
    from trainwright.models.weights import kept_tensors

    config = dataclasses.replace(model.config, head=spec)
    old, dtype, device = dict(model.state_dict()), model.head_dtype, model.embedding.weight.device
    new = build_hugging_face(config).to(dtype).train(model.training)
    if device.type != "meta":
        new.to_empty(device=device)
        new.tie_weights()
        first = f"{model.base_model_prefix}."
        for name, tensor in kept_tensors(new).items():
            known = next((n for n in (name, first + name, name.removeprefix(first)) if n in old), None)
            own = known is not None and old[known].shape == tensor.shape
            tensor.copy_(old[known] if own and known else initial_value(name, tensor.shape, config, seed))
    model.__dict__.clear()
    model.__dict__.update(new.__dict__)
    model.__class__ = new.__class__
    return model
