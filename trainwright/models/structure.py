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
