"""Finding the repeated blocks of any module by its structure: the units that are gathered, recomputed or compiled."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trainwright.models import Backbone

__all__ = ["blocks_of", "find_blocks"]


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of every block that this process holds of `model`: by its plan where it is one of our families.

    A part of a pipeline holds some of the blocks, perhaps a single one, which no structure would show.
    """
    if not isinstance(model, Backbone):
        return find_blocks(model)
    stack = model.blocks
    path = next(name for name, module in model.named_modules() if module is stack)
    return [(f"{path}.{name}", block) for name, block in stack.named_children()]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of every repeated block, in order of definition; empty where a module repeats nothing.

    A block is an element of an outermost `ModuleList` or `Sequential` of two or more modules of one class that hold
    parameters and are called (a `ModuleDict` has no forward of its own). Native decoders, Hugging Face stacks, both
    stacks of an encoder-decoder and hand-written models all look like this. A block that shares a parameter with the
    rest of the model is left out: whoever divides parameters by blocks would divide that one twice.
    """
    found = list(_outermost(model, ""))
    owners: dict[int, set[str]] = {}
    inside = {id(module): name for name, block in found for module in block.modules()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(inside.get(id(module), ""))
    shared = {id_ for id_, names in owners.items() if len(names) > 1}
    return [(name, block) for name, block in found if not any(id(p) in shared for p in block.parameters())]


def _outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_stack(child):
            seen: set[int] = set()
            for index, block in child.named_children():
                if id(block) not in seen:  # a block that stands in the list twice is one block
                    seen.add(id(block))
                    yield f"{path}.{index}", block
        else:
            yield from _outermost(child, f"{path}.")


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = list(module.children())
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(_has_forward(child) and any(True for _ in child.parameters()) for child in children)
    )


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
