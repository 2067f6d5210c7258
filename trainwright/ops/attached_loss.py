"""A loss that has no way of its own to the end of a model: it is trained through activations that have one.

In a pipeline the loss of the last part alone is differentiated; what an earlier part adds to the objective gets its
gradient by being attached to what that part hands on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_loss"]


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x itself; whoever differentiates something that depends on it differentiates also `loss`, a scalar, with factor
    1. An fp16 loss scale has to be in `loss` already."""
    out: Tensor = _Attached.apply(x, loss)
    return out


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.kind, ctx.device = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=ctx.kind, device=ctx.device)
