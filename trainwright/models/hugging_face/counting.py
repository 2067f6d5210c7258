"""Sizes of a transformers model, read off its modules on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from trainwright.models.hugging_face.plan import block_stacks
from trainwright.models.hugging_face.structure import structure

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["Sizes", "sizes_of"]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        parameters: all, tied ones once.
        matrices: that a token is multiplied by, by name: all matrices but embeddings, of experts those that it goes to,
            and the output projection (tied or not, under its own name).
        blocks: names of the repeated blocks, of all lists of them. block: parameters of one of them, on average.
        embedding, head: outside blocks, tied ones in both. tied: whether they are one.
        embedding_name, head_name: modules; None where there is no such thing.
    """

    parameters: int
    matrices: Mapping[str, int]
    blocks: tuple[str, ...]
    block: int
    embedding: int
    head: int
    tied: bool
    embedding_name: str | None
    head_name: str | None


def sizes_of(config: HuggingFaceConfig) -> Sizes:
    """The sizes of a configuration; nothing is allocated."""
    model = structure(config).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_weight, head_weight = getattr(embedding, "weight", None), getattr(head, "weight", None)
    tied = head_weight is not None and head_weight is embedding_weight
    names = {id(module): name for name, module in model.named_modules()}
    head_name = None if head_weight is None else names[id(head)]
    matrices = {
        name: _active(config, p)
        for name, p in _matrices(model).items()
        if p is not head_weight and p is not embedding_weight
    }
    if head_weight is not None:
        matrices[f"{head_name}.weight"] = head_weight.numel()
    blocks = tuple(name for stack in block_stacks(model).values() for name in stack)
    inside = sum(p.numel() for name in blocks for p in model.get_submodule(name).parameters())
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=matrices,
        blocks=blocks,
        block=inside // max(1, len(blocks)),
        embedding=0 if embedding_weight is None else embedding_weight.numel(),
        head=0 if head_weight is None else head_weight.numel(),
        tied=tied,
        embedding_name=None if embedding_weight is None else names[id(embedding)],
        head_name=head_name,
    )


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two and more dimensions that are no table, by their first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2:
                found.setdefault(id(parameter), (f"{name}.{leaf}" if name else leaf, parameter))
    return dict(found.values())


def _active(config: HuggingFaceConfig, parameter: nn.Parameter) -> int:
    """Of [experts, ...], what the experts of one token have."""
    experts = getattr(config.hf, "num_local_experts", None) or getattr(config.hf, "num_experts", None)
    each = getattr(config.hf, "num_experts_per_tok", None)
    if parameter.dim() == 3 and isinstance(experts, int) and isinstance(each, int) and parameter.shape[0] == experts:
        return each * parameter[0].numel()
    return parameter.numel()
