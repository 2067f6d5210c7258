"""The model inside a checkpoint, which carries its own configuration: for generation and export without the recipe."""

from __future__ import annotations

from pathlib import Path

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import load_checkpoint
from trainwright.inference.adapter_checkpoints import adapters_in, frozen_values
from trainwright.models import build_model, kept_tensors
from trainwright.models.adapters import merge_adapter
from trainwright.models.backbone import Backbone
from trainwright.models.fields import config_from_fields

__all__ = ["load_checkpointed_model"]


def load_checkpointed_model(path: Path, *, dtype: torch.dtype | None = None) -> Backbone:
    """The model of a checkpoint folder, on the CPU in evaluation mode; averaged weights where there are any, and
    adapters merged into the weights that they stand beside.

    dtype: None keeps that of the trained weights.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds no model or not all of its weights; or it holds adapters,
            and the model that they stand beside is not there any more.
    """
    state, meta = load_checkpoint(path)
    try:
        config, weights = config_from_fields(meta["model"]), dict(state["engine"]["model"])
    except KeyError as error:
        raise CheckpointError(f"{path} holds no model ({error.args[0]!r} is missing)") from error
    # Of parameters: buffers are made in the type that they need.
    trained_dtype = next(iter(weights.values())).dtype
    model = build_model(config, device="meta", dtype=dtype or trained_dtype)
    report = adapters_in(meta, weights, model, path)
    averages = state["engine"].get("ema", {}).get("averages", {})
    weights.update({name: value for name, value in averages.items() if report is None or not report.is_frozen(name)})
    frozen = frozen_values(meta, report, config, path)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in kept_tensors(model).items():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])
            elif name not in weights and frozen is not None and report is not None and report.is_frozen(name):
                parameter.copy_(frozen(name, parameter.shape, parameter.dtype))
            else:
                raise CheckpointError(f"{path}: {name} is missing or not of shape {list(parameter.shape)}")
    if report is not None:
        merge_adapter(model)
    return model.eval()
