"""Sizes of a transformers model, read off its modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
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
        matmul: that a token is multiplied by: all matrices but embeddings, of experts those that it goes to, and the
            output projection (tied or not).
        blocks: repeated blocks, of all lists of them. block: of one of them, on average.
        embedding, head: outside blocks, tied ones in both. tied: whether they are one.
    """

    parameters: int
    matmul: int
    blocks: int
    block: int
    embedding: int
    head: int
    tied: bool


def sizes_of(config: HuggingFaceConfig) -> Sizes:
    """The sizes of a configuration; nothing is allocated."""
    model = structure(config).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_weight, head_weight = getattr(embedding, "weight", None), getattr(head, "weight", None)
    tied = head_weight is not None and head_weight is embedding_weight
    matrices = {
        id(p): _active(config, p) for p in _matrices(model) if p is not head_weight and p is not embedding_weight
    }
    head_size = 0 if head_weight is None else head_weight.numel()
    blocks = [model.get_submodule(name) for names in block_stacks(model).values() for name in names]
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        matmul=sum(matrices.values()) + head_size,
        blocks=len(blocks),
        block=inside // max(1, len(blocks)),
        embedding=0 if embedding_weight is None else embedding_weight.numel(),
        head=head_size,
        tied=tied,
    )


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() >= 2:
                yield parameter


def _active(config: HuggingFaceConfig, parameter: nn.Parameter) -> int:
    """Of [experts, ...], what the experts of one token have."""
    experts = getattr(config.hf, "num_local_experts", None) or getattr(config.hf, "num_experts", None)
    each = getattr(config.hf, "num_experts_per_tok", None)
    if parameter.dim() == 3 and isinstance(experts, int) and isinstance(each, int) and parameter.shape[0] == experts:
        return each * parameter[0].numel()
    return parameter.numel()
