"""Linears that read the same input: one matrix product where joining their weights costs nothing, else one each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.ops.linear import fused_linear

__all__ = ["project_together"]


def project_together(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Every linear of x [..., D], in order.

    They are joined on a CPU under autocast, which copies the weights to round them anyway: about a third of a layer's
    calls go away. A module that is more than a plain linear (an adapter, a hooked or sharded one) is always called.
    """
    plain = [module for module in linears if type(module) is nn.Linear and not module._forward_hooks]
    if len(plain) == len(linears) and _rounds_anyway(x, plain[0].weight):
        return fused_linear(x, [module.weight for module in plain], [module.bias for module in plain])
    return tuple(module(x) for module in linears)


def _rounds_anyway(x: Tensor, weight: Tensor) -> bool:
    device = x.device.type
    return device == "cpu" and torch.is_autocast_enabled(device) and weight.dtype != torch.get_autocast_dtype(device)
