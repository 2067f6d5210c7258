"""Precision policies: in which type parameters live and in which type matrices are multiplied."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from trainwright.base.errors import ConfigError

__all__ = ["PRECISIONS", "Precision", "precision"]


@dataclass(frozen=True)
class Precision:
    """One policy.

    Attributes:
        name: the word used in recipes.
        parameter_dtype: type of parameters, gradients and optimizer state.
        compute_dtype: type of matrix products; differs from `parameter_dtype` only under autocast.
    """

    name: str
    parameter_dtype: torch.dtype
    compute_dtype: torch.dtype

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """The context in which the forward pass runs; empty where parameters already have the compute type."""
        if self.parameter_dtype == self.compute_dtype:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.compute_dtype)


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    # fp32 parameters, gradients and moments; matrix products in bf16. Norms, softmax and loss stay fp32.
    "bf16": Precision("bf16", torch.float32, torch.bfloat16),
    # bf16 weights and gradients; the optimizer keeps an fp32 copy of the weights, in which small updates add up.
    "bf16_pure": Precision("bf16_pure", torch.bfloat16, torch.bfloat16),
}


def precision(name: str) -> Precision:
    """The policy of that name; ConfigError for any other."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}") from None
