"""Adafactor (1804.04235) with the meaning of torch.optim.Adafactor: `lr` bounds the relative step min(lr, 1/sqrt(t)).

The second moment of a matrix is kept as one row and one column: state of rows + columns numbers instead of rows x
columns. Nothing is read back to the host, so a GPU never waits (torch's own version calls `.item()` per parameter).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainwright.optim.optimizer import Algorithm, ParameterState

__all__ = ["ADAFACTOR"]

SMALLEST_SCALE = 1e-3
"""The paper's eps2: a parameter near zero still moves as if its root mean square were this."""


def _init(parameter: Tensor, group: dict[str, Any]) -> ParameterState:
    step = {"step": torch.zeros((), dtype=torch.float32)}  # on the host: it only makes scalars
    if parameter.ndim < 2:
        return step | {"variance": torch.zeros_like(parameter)}
    *lead, rows, columns = parameter.shape
    return step | {"row_var": parameter.new_zeros(*lead, rows, 1), "col_var": parameter.new_zeros(*lead, 1, columns)}


def _update(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[ParameterState],
    gradient_factor: Tensor | None,
) -> None:
    for param, grad, state in zip(params, grads, states, strict=True):
        _update_one(group, param, grad, state)


def _update_one(group: dict[str, Any], param: Tensor, grad: Tensor, state: ParameterState) -> None:
    state["step"] += 1
    step = state["step"].item()
    one_minus_beta2 = step ** group["beta2_decay"]
    relative_step = min(group["lr"], step**-0.5)
    scale = (param.norm(2) / param.numel() ** 0.5).clamp_(min=SMALLEST_SCALE)
    if group["weight_decay"]:
        param.mul_(1 - group["lr"] * group["weight_decay"])
    eps = torch.finfo(param.dtype).eps
    variance = _second_moment(grad, state, one_minus_beta2, eps)
    update = variance.clamp_(min=eps * eps).rsqrt_().mul_(grad)
    clip = (update.norm(2) / (update.numel() ** 0.5 * group["update_clip"])).clamp_(min=1.0)
    param.sub_(update.mul_(scale * relative_step / clip))


def _second_moment(grad: Tensor, state: ParameterState, one_minus_beta2: float, eps: float) -> Tensor:
    if grad.ndim < 2:
        return state["variance"].lerp_(grad.square(), one_minus_beta2).clone()
    # A norm squared is the sum of squares without an intermediate the size of the gradient.
    row = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square_().div_(grad.size(-1))
    column = torch.linalg.vector_norm(grad, dim=-2, keepdim=True).square_().div_(grad.size(-2))
    state["row_var"].lerp_(row, one_minus_beta2)
    state["col_var"].lerp_(column, one_minus_beta2)
    outer = state["row_var"] @ state["col_var"]
    return outer.div_(state["row_var"].mean(dim=-2, keepdim=True).clamp_(min=eps))


ADAFACTOR = Algorithm(init=_init, update=_update)
