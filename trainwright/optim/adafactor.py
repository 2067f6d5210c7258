"""Adafactor (1804.04235) with the meaning of torch.optim.Adafactor: `lr` bounds the relative step min(lr, 1/sqrt(t)).

The second moment of a matrix is kept as one row and one column: state of rows + columns numbers instead of rows x
columns. Divided matrices need two small sums over the ranks per step, three where their columns are divided. Nothing is
read back to the host, so a GPU never waits (torch's own version calls `.item()` per parameter).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.exchange import sum_over_ranks
from trainwright.optim.shard import Shard

__all__ = ["ADAFACTOR"]

SMALLEST_SCALE = 1e-3
"""The paper's eps2: a parameter near zero still moves as if its root mean square were this."""


def _init(parameter: Tensor, group: Group) -> ParameterState:
    step = {"step": torch.zeros((), dtype=torch.float32)}  # on the host: it only makes scalars
    if parameter.ndim < 2:
        return step | {"variance": torch.zeros_like(parameter)}
    *lead, rows, columns = parameter.shape
    return step | {"row_var": parameter.new_zeros(*lead, rows, 1), "col_var": parameter.new_zeros(*lead, 1, columns)}


def _placed(key: str, shard: Shard) -> Shard | None:
    # Where the columns of a matrix lie on different ranks its row statistics belong to all, and the other way round.
    if key == "row_var":
        return shard.without(-1)
    return shard.without(-2) if key == "col_var" else shard


def _update(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    _update_rows(group, items)
    matrices = [item for item in items if len(item.shape) > 1]
    sums = sum_over_ranks(
        [_weights_squared(item) for item in items] + [_by_column(item) for item in matrices],
        [item.shard for item in items] + [_over(item, -2) for item in matrices],
    )
    columns = dict(zip(map(id, matrices), sums[len(items) :], strict=True))
    updates = [None if item.gradient is None else _direction(group, item, columns.get(id(item))) for item in items]
    squares = sum_over_ranks(
        [
            item.weights.new_zeros(1) if update is None else _squared(update)
            for item, update in zip(items, updates, strict=True)
        ],
        [item.shard for item in items],
    )
    for item, update, weights, square in zip(items, updates, sums, squares, strict=False):
        if update is not None:
            _apply(group, item, update, weights[0], square[0])


def _over(item: Item, dim: int) -> Shard | None:
    return None if item.shard is None else item.shard.over(dim)


def _squared(tensor: Tensor) -> Tensor:
    # A norm squared is the sum of squares without an intermediate the size of the tensor.
    return torch.linalg.vector_norm(tensor).square_()[None]


def _weights_squared(item: Item) -> Tensor:
    return item.weights.new_zeros(1) if item.gradient is None else _squared(item.weights)


def _update_rows(group: Group, items: list[Item]) -> None:
    """Count the step, and bring the row statistics of matrices up to date."""
    matrices = [item for item in items if len(item.shape) > 1]
    squares = [
        item.weights.new_zeros(item.weights.shape[:-1].numel())
        if item.gradient is None
        else torch.linalg.vector_norm(item.gradient, dim=-1).square_().view(-1)
        for item in matrices
    ]
    summed = sum_over_ranks(squares, [_over(item, -1) for item in matrices])
    for item in items:
        if item.gradient is not None:
            item.state["step"] += 1
    for item, square in zip(matrices, summed, strict=True):
        if item.gradient is not None:
            rows = item.state["row_var"]
            rows.lerp_(square.view(rows.shape) / item.shape[-1], _one_minus_beta2(group, item))


def _by_column(item: Item) -> Tensor:
    """Of each matrix, as far as this rank has its rows: the sum of its row statistics, and of squares by column."""
    lead, columns = item.weights.shape[:-2].numel(), item.weights.shape[-1]
    if item.gradient is None:
        return item.weights.new_zeros(lead * (1 + columns))
    squares = torch.linalg.vector_norm(item.gradient, dim=-2).square_()
    return torch.cat([item.state["row_var"].sum(dim=-2).view(lead), squares.view(lead * columns)])


def _one_minus_beta2(group: Group, item: Item) -> float:
    return float(item.state["step"].item() ** group["beta2_decay"])


def _direction(group: Group, item: Item, summed: Tensor | None) -> Tensor:
    """The update before it is clipped and scaled: gradient / sqrt(second moment)."""
    grad, state = item.grad, item.state
    one_minus_beta2 = _one_minus_beta2(group, item)
    eps = torch.finfo(item.weights.dtype).eps
    if summed is None:
        variance = state["variance"].lerp_(grad.square(), one_minus_beta2).clone()
    else:
        rows = item.shape[-2]
        columns = state["col_var"]
        matrices = columns.shape[:-2].numel()
        mean_of_rows, squares = summed.split([matrices, summed.numel() - matrices])
        columns.lerp_(squares.view(columns.shape) / rows, one_minus_beta2)
        smallest = (mean_of_rows / rows).clamp(min=eps).view(*columns.shape[:-2], 1, 1)
        variance = (state["row_var"] @ columns).div_(smallest)
    return variance.clamp_(min=eps * eps).rsqrt_().mul_(grad)


def _apply(group: Group, item: Item, update: Tensor, weights_squared: Tensor, update_squared: Tensor) -> None:
    relative_step = min(group["lr"], item.state["step"].item() ** -0.5)
    root = item.shape.numel() ** 0.5
    scale = (weights_squared.sqrt() / root).clamp_(min=SMALLEST_SCALE)
    clip = (update_squared.sqrt() / (root * group["update_clip"])).clamp_(min=1.0)
    if group["weight_decay"]:
        item.weights.mul_(1 - group["lr"] * group["weight_decay"])
    item.weights.sub_(update.mul_(scale * relative_step / clip))


ADAFACTOR = Algorithm(init=_init, update=_update, whole=True, placed=_placed)
