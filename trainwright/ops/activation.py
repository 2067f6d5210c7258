"""Activations of the supported model families, and the gated form that Llama uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ModelError

__all__ = ["activation", "gelu", "gelu_new", "relu", "silu", "swiglu", "swiglu_reference"]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) (Elfwing et al. 2017, arXiv 1702.03118)."""
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact normal distribution function (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU that GPT-2 was trained with; Hugging Face calls it `gelu_new` or
    `gelu_pytorch_tanh`.
    """
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the gated unit of Shazeer 2020 (arXiv 2002.05202); both [..., intermediate], same dtype.

    Computed in fp32 and rounded once: under a compiler the widening costs nothing, and one rounding is more exact
    than two.
    """
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in float64."""
    exact = gate.double()
    return (exact / (1 + torch.exp(-exact)) * up.double()).to(gate.dtype)


_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a Hugging Face config calls `name` (`hidden_act`, `activation_function`).

    Raises ModelError for a name that is not known.
    """
    if name not in _BY_NAME:
        raise ModelError(f"unknown activation {name!r}", hint=f"use one of: {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]
