"""A model's structure as plain data, for whoever splits, shards, recomputes or plans it without knowing its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ModelPlan", "SplitLinear"]


@dataclass(frozen=True)
class SplitLinear:
    """How one linear inside a block may be divided over devices (Megatron-LM, arXiv 1909.08053, section 3).

    name: module name relative to the block.
    kind: `column` divides the output features, `row` divides the input features and sums the outputs.
    units: what may not be cut: the number of devices must divide it (heads, key/value heads, or MLP width). Units are
        neighbours in the divided features.
    serves: another linear, each of whose units uses one of this one's (query heads share key/value heads). Where the
        devices do not divide `units`, it is held whole, and each device computes what its part of that other one needs.
    """

    name: str
    kind: Literal["column", "row"]
    units: int
    serves: str | None = None


@dataclass(frozen=True)
class ModelPlan:
    """Where things are in a model, by module names; those of `linears`, `norms` and `cheap` are relative to a block.

    blocks: the ModuleList of repeated layers.
    position_embedding: learned positions, or None where positions are computed.
    tied: pairs (kept, alias) of parameter names that are one parameter.
    cheap: modules whose output takes little compute against the memory it holds: recompute these first.
    before: the module that holds all that comes before the blocks; None where only the embeddings do.
    embedding_rest, head_rest: other modules with parameters before the blocks, and between the final norm and the head.
    """

    blocks: str
    num_blocks: int
    embedding: str
    position_embedding: str | None
    final_norm: str
    head: str
    tied: tuple[tuple[str, str], ...]
    linears: tuple[SplitLinear, ...]
    norms: tuple[str, ...]
    cheap: tuple[str, ...]
    before: str | None = None
    embedding_rest: tuple[str, ...] = ()
    head_rest: tuple[str, ...] = ()

    @property
    def head_module(self) -> str:
        """The module that holds the head and all that only it needs."""
        return self.head.partition(".")[0] if self.head_rest else self.head
