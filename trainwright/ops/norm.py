"""Normalisation layers as functions: statistics in fp32, result in the dtype of the input.

`rms_norm` is Zhang & Sennrich 2019 (arXiv 1910.07467) in the order of operations that Llama uses: the normalised
value is rounded to the input dtype before it meets the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["layer_norm", "layer_norm_reference", "rms_norm", "rms_norm_reference"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale `x` [..., D] to unit root mean square over its last dimension, then by `weight` [D].

    Written in elementary operations on purpose: inside a compiled block they fuse with the residual addition before
    and the rounding to bf16 after, which a library kernel would prevent. float64 stays float64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, in float64: x / sqrt(mean(x^2) + eps) * weight."""
    exact = x.double()
    return (exact / torch.sqrt(exact.pow(2).mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension of `x` [..., D] (Ba et al. 2016, arXiv 1607.06450), statistics in
    fp32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide_bias = None if bias is None else bias.to(wide.dtype)
    normalised = torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), wide_bias, eps)
    return normalised.to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition, in float64: (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance."""
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return (scaled if bias is None else scaled + bias.double()).to(x.dtype)
