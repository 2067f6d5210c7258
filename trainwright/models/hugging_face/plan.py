"""The structure of a transformers model as plain data, as far as it can be read off its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from trainwright.base.errors import ModelError
from trainwright.models.hugging_face.structure import structure
from trainwright.models.structure import ModelPlan

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["block_stacks", "plan"]


def block_stacks(model: nn.Module) -> dict[str, list[str]]:
    """Lists of repeated blocks: name of the list -> names of its blocks, in order of definition."""
    found: dict[str, list[str]] = {}

    def look(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            blocks = list(child.children())
            repeated = isinstance(child, nn.ModuleList) and blocks and len({type(block) for block in blocks}) == 1
            if repeated and all(any(True for _ in block.parameters()) for block in blocks):
                found[path] = [f"{path}.{leaf}" for leaf, _ in child.named_children()]
            else:
                look(child, f"{path}.")

    look(model, "")
    return found


def plan(config: HuggingFaceConfig) -> ModelPlan:
    """Where the parts of a decoder are; how its linears are divided, transformers' own plan says (`_tp_plan`).

    Raises:
        ModelError: it has no single list of blocks, or no output projection.
    """
    facts = structure(config)
    names = {id(module): name for name, module in facts.model.named_modules()}
    stacks = block_stacks(facts.model)
    head = facts.model.get_output_embeddings()
    if len(stacks) != 1 or head is None:
        raise ModelError(f"{type(facts.model).__name__} has {len(stacks)} lists of blocks, and a plan is of one")
    (stack, blocks), *_ = stacks.items()
    norms = tuple(
        name for name, module in facts.model.get_submodule(blocks[0]).named_modules() if "Norm" in type(module).__name__
    )
    return ModelPlan(
        blocks=stack,
        num_blocks=len(blocks),
        embedding=names[id(facts.model.get_input_embeddings())],
        position_embedding=None,
        final_norm="",
        head=names[id(head)],
        tied=tuple((kept, alias) for alias, kept in facts.aliases.items()),
        linears=(),
        norms=norms,
        cheap=norms,
    )
