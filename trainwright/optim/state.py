"""Optimizer state between memory and checkpoint: presented as whole tensors, checked before any of it is loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainwright.base.errors import CheckpointError
from trainwright.optim.algorithm import Algorithm, ParameterState
from trainwright.optim.shard import Shard

__all__ = ["loadable", "present", "refuse_other_names", "settings_of"]


def present(state: ParameterState, shard: Shard | None, algorithm: Algorithm) -> dict[str, Tensor]:
    """The state of one parameter with this rank's parts as DTensors; the same memory."""
    if shard is None:
        return dict(state)
    presented: dict[str, Tensor] = {}
    for key, tensor in state.items():
        placed = _placed(key, tensor, shard, algorithm)
        presented[key] = tensor if placed is None else placed.wrap(tensor)
    return presented


def loadable(
    name: str, saved: dict[str, Any], expected: ParameterState, shard: Shard | None, algorithm: Algorithm
) -> ParameterState:
    """The local tensors of a presented (or plain and whole) state.

    Raises CheckpointError unless keys, shapes and types are those of `expected`.
    """
    if set(saved) != set(expected):
        raise CheckpointError(
            f"optimizer state of {name} holds {sorted(saved)}, expected {sorted(expected)}",
            hint="resume with the precision and optimizer options that the checkpoint was made with",
        )
    found: ParameterState = {}
    for key, like in expected.items():
        value: Tensor = saved[key]
        placed = None if shard is None else _placed(key, like, shard, algorithm)
        whole = list(like.shape if placed is None else placed.shape)
        if list(value.shape) != whole:
            raise CheckpointError(
                f"optimizer state {key} of {name} has shape {list(value.shape)}, expected {whole}",
                hint="the checkpoint belongs to a model of another size",
            )
        if value.dtype != like.dtype:
            raise CheckpointError(
                f"optimizer state {key} of {name} is {value.dtype}, expected {like.dtype}",
                hint="resume with the precision and optimizer options that the checkpoint was made with",
            )
        found[key] = value if placed is None else placed.unwrap(value, f"optimizer state {key} of {name}")
    return found


def settings_of(state: dict[str, Any], mine: set[str]) -> dict[str, dict[str, Any]]:
    """Algorithm and learning rate of every parameter of an optimizer's state dict, by name.

    Versions before pipelines saved them by group, with the names of all parameters. Of those only `mine` and such that
    have a state here are meant: a rank of a pipeline gets the tensors of its own parameters alone.
    """
    if "groups" not in state:
        return dict(state["settings"])
    return {
        name: {"algorithm": group["algorithm"], "lr": group["lr"]}
        for group in state["groups"]
        for name in group["names"]
        if name in mine or name in state["parameters"]
    }


def refuse_other_names(saved: set[str], mine: set[str]) -> None:
    """CheckpointError, with some of the names, unless the two are the same."""
    if saved == mine:
        return
    parts = []
    for what, names in (("missing from the checkpoint", mine - saved), ("not trained by this run", saved - mine)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {what} ({shown})")
    raise CheckpointError(
        f"optimizer state does not fit the model: parameters {'; '.join(parts)}",
        hint="resume with the model and freeze rules of the saved run, or start from its weights only",
    )


def _placed(key: str, tensor: Tensor, shard: Shard, algorithm: Algorithm) -> Shard | None:
    return algorithm.placed(key, shard) if tensor.ndim > 0 else None
