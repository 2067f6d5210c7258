"""fp8 matrix products in linear layers, through torchao, on devices that multiply fp8."""

from __future__ import annotations

import torch
from torch import nn

from trainwright.base.errors import ConfigError, MissingDependencyError
from trainwright.config import PrecisionSection
from trainwright.config.precision_section import FP8Precision
from trainwright.models.task_heads import RowHead, TokenHead

__all__ = ["use_float8"]

MULTIPLE = 16
"""Both sides of an fp8 product must be multiples of this (torch._scaled_mm)."""


def use_float8(model: nn.Module, section: PrecisionSection, device: torch.device) -> int:
    """Exchange the linear layers whose shapes allow it; returns how many. The output layer stays as it is.

    Raises:
        ConfigError: the device does not multiply fp8. MissingDependencyError: torchao is not installed.
    """
    assert isinstance(section, FP8Precision)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"precision is fp8, and {device.type} does not multiply fp8 (CUDA devices of capability 8.9 and later do)",
            hint="use precision=bf16",
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingDependencyError(
            "precision fp8 needs torchao", hint="pip install 'trainwright[torchao]'"
        ) from error
    exchanged = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal exchanged
        # Heads compute in the type of the others, and those of tasks are linears with a forward pass of their own.
        if not isinstance(module, nn.Linear) or isinstance(module, RowHead | TokenHead) or "lm_head" in name.split("."):
            return False
        allowed = module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
        exchanged += allowed
        return allowed

    config = Float8LinearConfig.from_recipe_name(section.recipe)
    convert_to_float8_training(model, config=config, module_filter_fn=fits)
    return exchanged
