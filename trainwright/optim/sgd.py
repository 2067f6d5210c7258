"""Stochastic gradient descent with momentum, as torch.optim.SGD computes it (weight decay is an L2 term)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState

__all__ = ["SGD"]

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps"})


def _uses_fused(group: Group, device: torch.device) -> bool:
    return bool(group["fused"]) and device.type in FUSED_DEVICES


def _init(parameter: Tensor, group: Group) -> ParameterState:
    # A zero buffer gives torch's first step exactly: momentum * 0 + gradient.
    return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}


def _update(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    fused = _uses_fused(group, items[0].weights.device)
    sgd(
        [item.weights for item in items],
        [item.grad for item in items],
        [item.state.get("momentum_buffer") for item in items],
        fused=fused,
        foreach=not fused,
        grad_scale=None if gradient_factor is None else gradient_factor.reciprocal(),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


SGD = Algorithm(init=_init, update=_update, folds_factor=_uses_fused)
