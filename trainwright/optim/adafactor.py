"""Adafactor (1804.04235) with the meaning of torch.optim.Adafactor: `lr` bounds the relative step min(lr, 1/sqrt(t)).

The second moment of a matrix is kept as one row and one column: state of rows + columns numbers instead of rows x
columns. Sharded matrices need two small sums over the ranks per step. Nothing is read back to the host, so a GPU never
waits (torch's own version calls `.item()` per parameter).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.exchange import sum_over_ranks

__all__ = ["ADAFACTOR"]

SMALLEST_SCALE = 1e-3
"""The paper's eps2: a parameter near zero still moves as if its root mean square were this."""


def _init(parameter: Tensor, group: Group) -> ParameterState:
    step = {"step": torch.zeros((), dtype=torch.float32)}  # on the host: it only makes scalars
    if parameter.ndim < 2:
        return step | {"variance": torch.zeros_like(parameter)}
    *lead, rows, columns = parameter.shape
    return step | {"row_var": parameter.new_zeros(*lead, rows, 1), "col_var": parameter.new_zeros(*lead, 1, columns)}


def _replicated(key: str, dimensions: int) -> bool:
    # Rows of a matrix lie on different ranks, so its column statistics belong to all; of a stack each has its own.
    return key == "col_var" and dimensions == 2


def _update(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    shards = [item.shard for item in items]
    sums = sum_over_ranks([_first_sums(group, item) for item in items], shards)
    updates = [
        None if item.gradient is None else _direction(group, item, summed)
        for item, summed in zip(items, sums, strict=True)
    ]
    squares = sum_over_ranks(
        [
            item.weights.new_zeros(1) if update is None else torch.linalg.vector_norm(update).square_()[None]
            for item, update in zip(items, updates, strict=True)
        ],
        shards,
    )
    for item, update, summed, square in zip(items, updates, sums, squares, strict=True):
        if update is not None:
            _apply(group, item, update, summed[0], square[0])


def _first_sums(group: Group, item: Item) -> Tensor:
    """What the step of one parameter needs of all its rows, as far as this rank has them: the squared norm of the
    weights and, of a matrix, the sum of its row statistics (brought up to date here) and of squares by column."""
    columns = item.shape[1] if len(item.shape) == 2 else 0
    if item.gradient is None:
        return item.weights.new_zeros(1 + (columns and 1 + columns))
    item.state["step"] += 1
    weights = torch.linalg.vector_norm(item.weights).square_()[None]
    if item.gradient.ndim < 2:
        return weights
    # A norm squared is the sum of squares without an intermediate the size of the gradient.
    row = torch.linalg.vector_norm(item.gradient, dim=-1, keepdim=True).square_().div_(item.shape[-1])
    item.state["row_var"].lerp_(row, _one_minus_beta2(group, item))
    if not columns:
        return weights
    squares = torch.linalg.vector_norm(item.gradient, dim=-2).square_()
    return torch.cat([weights, item.state["row_var"].sum()[None], squares])


def _one_minus_beta2(group: Group, item: Item) -> float:
    return float(item.state["step"].item() ** group["beta2_decay"])


def _direction(group: Group, item: Item, summed: Tensor) -> Tensor:
    """The update before it is clipped and scaled: gradient / sqrt(second moment)."""
    grad, state = item.grad, item.state
    one_minus_beta2 = _one_minus_beta2(group, item)
    eps = torch.finfo(item.weights.dtype).eps
    if grad.ndim < 2:
        variance = state["variance"].lerp_(grad.square(), one_minus_beta2).clone()
    else:
        rows = item.shape[-2]
        if grad.ndim == 2:
            mean_of_rows, squares = summed[1] / rows, summed[2:].view(1, -1)
        else:
            mean_of_rows = state["row_var"].mean(dim=-2, keepdim=True)
            squares = torch.linalg.vector_norm(grad, dim=-2, keepdim=True).square_()
        state["col_var"].lerp_(squares / rows, one_minus_beta2)
        variance = (state["row_var"] @ state["col_var"]).div_(mean_of_rows.clamp(min=eps))
    return variance.clamp_(min=eps * eps).rsqrt_().mul_(grad)


def _apply(group: Group, item: Item, update: Tensor, weights_squared: Tensor, update_squared: Tensor) -> None:
    relative_step = min(group["lr"], item.state["step"].item() ** -0.5)
    root = item.shape.numel() ** 0.5
    scale = (weights_squared.sqrt() / root).clamp_(min=SMALLEST_SCALE)
    clip = (update_squared.sqrt() / (root * group["update_clip"])).clamp_(min=1.0)
    if group["weight_decay"]:
        item.weights.mul_(1 - group["lr"] * group["weight_decay"])
    item.weights.sub_(update.mul_(scale * relative_step / clip))


ADAFACTOR = Algorithm(init=_init, update=_update, whole=True, replicated=_replicated)
