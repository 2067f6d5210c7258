"""Initial weights: each parameter drawn from a generator of its own, so that layout and order cannot change them.

Matrices and embeddings are normal with `initializer_range`; projections that write into the residual stream are scaled
by 1 / sqrt(2 * layers), so that its variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3);
biases and the transitions of a CRF are zero, and norms are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.models.backbone import Backbone
from trainwright.models.hugging_face import initial
from trainwright.models.hugging_face.structure import HEAD_PREFIXES
from trainwright.models.weights import kept_tensors

Model = TypeVar("Model", bound=Backbone)

__all__ = ["initial_value", "initial_values", "initialise", "materialize"]

_RESIDUAL_WRITERS = (
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
    "mlp.experts.down_proj",
    "mlp.shared_expert.down_proj.weight",
    "attn.c_proj.weight",
    "mlp.c_proj.weight",
)


def initial_value(name: str, shape: Sequence[int], config: Any, seed: int) -> Tensor:
    """The whole fp32 CPU tensor that parameter `name` starts from: a pure function of its arguments.

    Drawn on the CPU whatever the device, so that a run on a GPU starts from the same weights.
    """
    if config.family == "transformers" and not name.startswith(HEAD_PREFIXES):
        return initial.initial_value(name, shape, config, seed)
    if name.endswith("bias") or ".crf." in name:
        return torch.zeros(tuple(shape))
    if len(shape) == 1:
        return torch.ones(tuple(shape))
    std = config.initializer_range
    if name.endswith(_RESIDUAL_WRITERS):
        std /= math.sqrt(2 * config.num_layers)
    generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def initial_values(config: Any, seed: int) -> Callable[[str, Sequence[int], torch.dtype], Tensor]:
    """`initial_value` of every name in any type: what a divided model on the meta device is given its weights by."""
    return lambda name, shape, dtype: initial_value(name, shape, config, seed).to(dtype)


@torch.no_grad()
def initialise(model: Backbone, seed: int) -> None:
    """Fill every parameter and kept buffer of a model that has storage, in place. Tied parameters count once, by their
    first name."""
    for name, parameter in kept_tensors(model).items():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def materialize(model: Model, device: torch.device | str, seed: int) -> Model:
    """Give a model built with device="meta" its storage on `device` and its initial weights; returns the same model."""
    model.to_empty(device=device)
    model.tie_weights()
    initialise(model, seed)
    return model
