"""What an optimizer's algorithm is: plain functions on this rank's part of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.optim.shard import Shard

__all__ = ["Algorithm", "Group", "Item", "ParameterState", "Update"]

Group = dict[str, Any]
"""Options of a parameter group: `lr`, `weight_decay` and those of its algorithm."""

ParameterState = dict[str, Tensor]


@dataclass(slots=True)
class Item:
    """One parameter in one update: plain tensors that hold this rank's part of it.

    Attributes:
        weights: this rank's part, updated in place; fp32 (or as the user made it).
        gradient: like `weights`, same type; None where it has none on this rank (only algorithms with `whole` see that,
            and leave such weights alone).
        state: the tensors of the algorithm's `init`; empty where `gradient` is None and it never had one.
        shard: how the parameter is divided; None where every rank holds the whole parameter.
    """

    weights: Tensor
    gradient: Tensor | None
    state: ParameterState
    shard: Shard | None

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""
        return self.weights.shape if self.shard is None else self.shard.shape

    @property
    def grad(self) -> Tensor:
        assert self.gradient is not None, "an algorithm without `whole` was given a parameter without a gradient"
        return self.gradient


class Update(Protocol):
    """Updates the weights and states of `items` in place. A rank may hold nothing of some."""

    def __call__(self, group: Group, items: list[Item], gradient_factor: Tensor | None) -> None: ...


def _never(group: Group, device: torch.device) -> bool:
    return False


def _as_the_parameter(key: str, shard: Shard) -> Shard | None:
    return shard


def _nothing_against(shard: Shard) -> str | None:
    return None


@dataclass(frozen=True)
class Algorithm:
    """How one kind of optimizer makes and uses the state of a parameter.

    Args:
        init: (this rank's part, group) -> state tensors, zero at the start.
        update: see `Update`.
        folds_factor: (group, device) -> whether `update` itself multiplies gradients by `gradient_factor`
            (saving a pass over memory); otherwise it always gets None.
        whole: `update` looks beyond this rank's part, through collectives in the parameters' meshes. It is then given
            all divided parameters of the group, so that every rank makes the same calls whatever has a gradient.
        placed: (state key, how the parameter is divided) -> how that state tensor is; None where it is whole and equal
            on all ranks. Scalars always are.
        refuses: how a parameter is divided -> why this algorithm cannot update it then; None where it can.
    """

    init: Callable[[Tensor, Group], ParameterState]
    update: Update
    folds_factor: Callable[[Group, torch.device], bool] = _never
    whole: bool = False
    placed: Callable[[str, Shard], Shard | None] = _as_the_parameter
    refuses: Callable[[Shard], str | None] = _nothing_against
