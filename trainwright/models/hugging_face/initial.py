"""Initial weights of a transformers model: its own rules, one parameter at a time.

The rules of an architecture are code (`_init_weights`) that fills all parameters of a module. Here it runs on the twin
of the meta device, in which only the wanted parameter is real, under a generator seeded by its name: so layout and
order change no weight, and no more than one parameter needs memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.base.seeds import derive_seed
from trainwright.models.hugging_face.structure import structure

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["initial_value"]

_filling = threading.Lock()


def initial_value(name: str, shape: Sequence[int], config: HuggingFaceConfig, seed: int) -> Tensor:
    """The whole fp32 CPU tensor that a parameter or saved buffer starts from: a pure function of its arguments.

    Raises:
        ModelError: the model has no such parameter, or of another shape.
    """
    facts = structure(config)
    if name in facts.state:
        return facts.state[name].clone()
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = facts.model.get_submodule(owner_name)
        twin = owner._parameters[leaf]
    except (AttributeError, KeyError):
        raise ModelError(f"{type(facts.model).__name__} has no parameter {name}") from None
    if tuple(twin.shape) != tuple(shape):
        raise ModelError(f"{name} is {list(twin.shape)}, and a value of {list(shape)} was asked for")
    value = nn.Parameter(torch.zeros(tuple(shape)))
    # Where a name is one of several of a tied parameter, the rules of all its owners may see it; the first name counts.
    with _filling, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", name))
        owner._parameters[leaf] = value
        try:
            if callable(reset := getattr(owner, "reset_parameters", None)):
                reset()
            for module, rules in _from_inside(facts.model, owner_name):
                rules._init_weights(module)
        finally:
            owner._parameters[leaf] = twin
    return value.detach()


def _from_inside(model: Any, name: str) -> Iterator[tuple[nn.Module, Any]]:
    """(module, the model whose rules are its) from the module of that name out to the whole: the order in which rules
    run, since those of an outer module may overwrite those of an inner one."""
    path = [model]
    for part in name.split(".") if name else ():
        path.append(path[-1].get_submodule(part))
    for depth in range(len(path) - 1, -1, -1):
        module = path[depth]
        rules = next(outer for outer in reversed(path[: depth + 1]) if hasattr(outer, "_init_weights"))
        yield module, rules
