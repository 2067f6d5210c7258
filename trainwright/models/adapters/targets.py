"""Which linears get an adapter, and what else is trained."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.models.hugging_face.heads import is_of_head
from trainwright.models.hugging_face.model import HuggingFaceModel
from trainwright.models.moe.layer import Experts

__all__ = ["extra_parameters", "head_modules", "head_parameters", "target_linears", "task_head_of"]


def task_head_of(model: nn.Module) -> nn.Module | None:
    """The head of a task that stands on the model in place of the language model's; None where there is none."""
    head: nn.Module | None = getattr(model, "task_head", None)
    return head


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the task's head by name (a tied one under each), with those of transformers that lie between
    the trunk and the scores; empty where the language model's head stands."""
    head = task_head_of(model)
    if head is None:
        return {}
    own = {id(parameter) for parameter in head.parameters()}
    theirs = isinstance(model, HuggingFaceModel)
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own or (theirs and is_of_head(model, name))
    }


def head_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that make scores of hidden states: the language model's head, and the task's with all inside it."""
    heads: set[nn.Module] = set()
    task = task_head_of(model)
    if task is not None:
        heads.update(task.modules())
    outputs = getattr(model, "get_output_embeddings", None)  # of any transformers model
    found = getattr(model, "output_projection", None)
    if found is None and callable(outputs):
        found = outputs()
    if isinstance(found, nn.Module):
        heads.add(found)
    return heads


def target_linears(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The linears to adapt, by name, in order of definition.

    Args:
        patterns: searched in names of linears; None takes all that stand inside a list of blocks.

    Raises:
        ConfigError: a pattern finds no linear, or only such as cannot have an adapter (with the reason); nothing is
            found at all.
    """
    heads = head_modules(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    usable = {name: module for name, module in linears.items() if type(module) is nn.Linear and module not in heads}
    if patterns is None:
        inside = _names_in_blocks(model)
        chosen = {name: module for name, module in usable.items() if name in inside} or usable
        if not chosen:
            raise ConfigError(
                f"{type(model).__name__} has no linear layers that an adapter could stand beside",
                hint="its matrices are modules of another kind; adapter: {name: peft} may know them, and gpt2 has a"
                " native family with linears",
            )
        return chosen
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in usable):
            _refuse(pattern, model, linears, heads, usable)
    return {name: module for name, module in usable.items() if any(re.search(p, name) for p in patterns)}


def _names_in_blocks(model: nn.Module) -> set[str]:
    """Names of modules inside a list of modules: the repeated blocks of any model, and what is in them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefixes = tuple(f"{name}." for name in lists)
    return {name for name, _ in model.named_modules() if name.startswith(prefixes)} if prefixes else set()


def _refuse(
    pattern: str, model: nn.Module, linears: dict[str, nn.Linear], heads: set[nn.Module], usable: Iterable[str]
) -> None:
    modules = {name: module for name, module in model.named_modules() if name and re.search(pattern, name)}
    if any(module in heads for module in modules.values()):
        raise ConfigError(
            f"adapter.targets {pattern!r} names the head, whose weight the loss multiplies with itself",
            hint="train it as it is instead: adapter.train: [lm_head] (a task's own head is trained anyway)",
        )
    if any(isinstance(module, Experts) for module in modules.values()) or _of_experts(pattern, model):
        raise ConfigError(
            f"adapter.targets {pattern!r} names matrices of experts, which are one parameter for all experts of a layer"
            " and not linears",
            hint="adapt attention and the shared expert, or train experts as they are: adapter.train: ['experts']",
        )
    if any(re.search(pattern, name) for name in linears):
        raise ConfigError(
            f"adapter.targets {pattern!r} names linears that compute in a way of their own",
            hint=f"linears that can have an adapter: {', '.join(list(usable)[:4])}, ...",
        )
    names = list(usable)
    tails = {name.rpartition(".")[2]: name for name in names}
    plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern)
    near = difflib.get_close_matches(plain, [*tails, *names], n=3, cutoff=0.5)
    raise ConfigError(
        f"adapter.targets {pattern!r} matches none of the {len(names)} linears",
        hint=f"near names: {', '.join(near)}" if near else f"linears are called {', '.join(tails)}",
    )


def _of_experts(pattern: str, model: nn.Module) -> bool:
    return any(
        re.search(pattern, f"{name}.{leaf}")
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for leaf, _ in module.named_parameters(recurse=False)
    )


def extra_parameters(model: nn.Module, patterns: Sequence[str], adapted: Iterable[str]) -> list[str]:
    """Names of parameters that are trained as they are: the task head's, and those that a pattern finds. A tied one
    stands under each of its names, whichever of them was found.

    Args:
        adapted: names of linears that have an adapter: their own weights stay frozen.

    Raises:
        ConfigError: a pattern finds nothing, or the weight of an adapted linear.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = list(parameters)
    prefixes = tuple(f"{name}." for name in adapted)
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ConfigError(
                f"adapter.train {pattern!r} matches none of the {len(names)} parameters",
                hint=f"near names: {', '.join(near)}",
            )
        frozen = [name for name in found if name.startswith(prefixes)] if prefixes else []
        if frozen:
            raise ConfigError(
                f"adapter.train {pattern!r} names {frozen[0]}, of a linear that has an adapter",
                hint="name other parameters, or leave this linear out of adapter.targets",
            )
    chosen = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    trained = {id(parameters[name]) for name in (*head_parameters(model), *chosen)}
    return [name for name, parameter in parameters.items() if id(parameter) in trained]
