"""Names of parameters as the whole model has them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trainwright.parallel.pipeline import alias_parameters

__all__ = ["optimized_parameters"]


def optimized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) for `build_optimizer`: a copy of a tied parameter goes by the name of what it is a copy of.

    So it falls under the same rules, and both copies take the same steps.
    """
    aliases = alias_parameters(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield aliases.get(name, name), parameter
