"""Linear layers that share their input, as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fused_linear", "fused_linear_reference"]


def fused_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """x [..., D] through several linear layers [O_i, D] at once; gives one [..., O_i] each.

    The weights are joined anew each time, after they were rounded to the autocast dtype: the rounding copies them
    anyway, so joining costs nothing, and parameters keep their own names. One product instead of several reads x once
    in the forward pass, and the gradient of x is made in one product instead of a product and an addition for each
    layer.
    """
    device_type = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    bias = None
    if biases is not None and any(each is not None for each in biases):
        parts = [
            weight.new_zeros(weight.shape[0]) if each is None else each
            for weight, each in zip(weights, biases, strict=True)
        ]
        bias = torch.cat([part.to(dtype) for part in parts])
    joined = torch.cat([weight.to(dtype) for weight in weights])
    return F.linear(x.to(dtype), joined, bias).split([weight.shape[0] for weight in weights], dim=-1)


def fused_linear_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """The same as one linear layer after the other."""
    biases = biases if biases is not None else [None] * len(weights)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
