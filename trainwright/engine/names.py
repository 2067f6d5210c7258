"""Names of parameters as the whole model has them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trainwright.base.protocols import StateDict
from trainwright.parallel.pipeline import alias_parameters

__all__ = ["optimized_parameters", "with_tied_names", "without_tied_names"]


def optimized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) for `build_optimizer`: a copy of a tied parameter goes by the name of what it is a copy of.

    So it falls under the same rules, and both copies take the same steps.
    """
    aliases = alias_parameters(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield aliases.get(name, name), parameter


def with_tied_names(model: nn.Module, state: StateDict) -> StateDict:
    """A state dict of `model` in which a copy of a tied parameter stands under both names, as in the whole model.

    Only so a checkpoint can tell that the two are one parameter, which it stores once.
    """
    return {**{kept: state[alias] for alias, kept in alias_parameters(model).items()}, **state}


def without_tied_names(model: nn.Module, state: StateDict) -> StateDict:
    """The inverse: what this rank's modules know of."""
    elsewhere = set(alias_parameters(model).values())
    return {name: value for name, value in state.items() if name not in elsewhere}
