"""Precision policies: in which type parameters are held, gathered and multiplied, and how gradients travel."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainwright.base.errors import ConfigError
from trainwright.models import Backbone
from trainwright.models.adapters.linear import AdaptedLinear, held_types

__all__ = ["PRECISIONS", "Precision", "cast_model", "compute_in_fp32", "keep_residual_fp32", "precision", "wire_type"]

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """One policy.

    Attributes:
        name: the word used in recipes.
        parameter_dtype: type of parameters and gradients, and of optimizer state that has no copy in fp32.
        compute_dtype: type of matrix products; differs from `parameter_dtype` only under autocast.
        scales_loss: small gradients would vanish in the compute type, so the loss is multiplied before the backward.
    """

    name: str
    parameter_dtype: torch.dtype
    compute_dtype: torch.dtype
    scales_loss: bool = False

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """The context in which the forward pass runs; empty where parameters already have the compute type."""
        if self.parameter_dtype == self.compute_dtype:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)

    @property
    def gather_dtype(self) -> torch.dtype | None:
        """The type in which divided parameters are gathered; None where it is the one they are held in."""
        return None if self.parameter_dtype == self.compute_dtype else self.compute_dtype


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    # fp32 parameters, gradients and moments; matrix products in bf16. Norms, softmax and loss stay fp32.
    "bf16": Precision("bf16", torch.float32, torch.bfloat16),
    # The same in fp16, whose smallest number is 6e-8: the loss is scaled so that small gradients do not vanish.
    "fp16": Precision("fp16", torch.float32, torch.float16, scales_loss=True),
    # bf16 weights and gradients; how updates below bf16's spacing survive is the optimizer's matter.
    "bf16_pure": Precision("bf16_pure", torch.bfloat16, torch.bfloat16),
    # Linear layers multiply in fp8 (engine.float8 exchanges them); everything else as in bf16.
    "fp8": Precision("fp8", torch.float32, torch.bfloat16),
}


def precision(name: str) -> Precision:
    """The policy of that name; ConfigError for any other."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}") from None


def wire_type(word: str, policy: Precision) -> torch.dtype:
    """The type in which gradients travel; "auto" is the compute type, in which they were computed."""
    return policy.compute_dtype if word == "auto" else _TYPES[word]


def cast_model(model: nn.Module, policy: Precision, keep: set[nn.Module]) -> None:
    """Hold every floating-point parameter of `model` in the policy's type, those of the modules in `keep` in fp32.

    Buffers keep their types: tables and running statistics were made in the type that they need. So do frozen weights
    beside an adapter for which a type was asked.
    """
    inside = {inner for module in keep for inner in module.modules()}
    for module in model.modules():
        wanted = torch.float32 if module in inside else policy.parameter_dtype
        chosen = held_types(module) if isinstance(module, AdaptedLinear) and module not in inside else ()
        for name, parameter in module._parameters.items():
            if parameter is None or name in chosen or not parameter.is_floating_point():
                continue
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)


def compute_in_fp32(module: nn.Module, policy: Precision, device_type: str) -> None:
    """Let the forward pass of `module` run in fp32 whatever the policy: inputs are cast and autocast is off.

    Outputs stay fp32 under autocast, whose next operation casts them; without autocast they get the policy's type back.
    """
    forward = module.forward
    back = None if policy.parameter_dtype == torch.float32 else policy.parameter_dtype

    def cast(value: object, dtype: torch.dtype) -> object:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    @functools.wraps(forward)
    def in_fp32(*inputs: Any, **named: Any) -> Any:
        inputs, named = tree_map(lambda value: cast(value, torch.float32), (inputs, named))
        with torch.autocast(device_type, enabled=False):
            output = forward(*inputs, **named)
        return output if back is None else tree_map(lambda value: cast(value, back), output)

    module.forward = in_fp32


def keep_residual_fp32(model: Backbone) -> None:
    """Let the residual stream of a decoder begin in fp32 although its embedding is gathered in the compute type.

    Under autocast alone the stream is fp32, because the embedding is; block outputs add to it without being rounded.
    """
    if model.embedding is not None:  # the first part of a pipeline has it
        model.embedding.register_forward_hook(lambda module, inputs, output: output.float())
