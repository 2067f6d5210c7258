"""Which parameters a run trains and how all of them are held, as plain numbers: what memory, time and MFU go by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["BlockSizes", "Held", "Holding", "Training"]

Held = Literal["policy", "compute", "fp32", "bf16", "fp16", "nf4"]
"""In which type: that of the precision policy, that of matrix products, one by name, or 4-bit NormalFloat."""


@dataclass(frozen=True)
class BlockSizes:
    """Numbers of one block: all, and of these what tensor ranks hold whole, projections to keys and values (which they
    hold whole where they do not divide the heads), and experts."""

    total: int = 0
    whole: int = 0
    kv: int = 0
    experts: int = 0


@dataclass(frozen=True)
class Holding:
    """Parameters of a model that are treated alike. Sizes are numbers of parameters; of `nf4` they are bytes, which
    codes and magnitudes take together.

    Attributes:
        trained: they get gradients and optimizer state.
        held: see `Held`.
        blocks: of every block, along the model.
        embedding, head: outside blocks, tied ones in both; divided by vocabulary. tied: whether they are.
        positions: beside the embedding, held whole by every tensor rank. top: beside the head, likewise.
    """

    trained: bool
    held: Held
    blocks: tuple[BlockSizes, ...]
    embedding: int = 0
    head: int = 0
    positions: int = 0
    top: int = 0
    tied: bool = False

    @property
    def total(self) -> int:
        """All of them, tied ones once."""
        outside = self.embedding + self.positions + self.top + (0 if self.tied else self.head)
        return sum(block.total for block in self.blocks) + outside


@dataclass(frozen=True)
class Training:
    """What a run trains of a model.

    Attributes:
        holdings: every parameter is in one.
        trained, total: parameters, adapters included, tied ones once; a weight in 4 bits by its values.
        flops: of forward and backward per position, as far as they are computed: no gradient of a frozen weight, and
            of no activation below the lowest trained parameter.
        first_kept: the lowest block that keeps activations for the backward pass.
        kept: numbers that adapters keep of a position beside what a model without them keeps, in all blocks together.
        what: one line for a person.
    """

    holdings: tuple[Holding, ...]
    trained: int
    total: int
    flops: float
    first_kept: int = 0
    kept: int = 0
    what: str = "all parameters"

    @property
    def is_whole(self) -> bool:
        """Whether every parameter is trained."""
        return self.trained == self.total

    def times(self, factor: float) -> Training:
        """The same with so many positions computed for each that is counted."""
        return replace(self, flops=self.flops * factor)

    def of(self, *, trained: bool) -> Iterator[Holding]:
        """Those that are trained, or those that are not."""
        return (holding for holding in self.holdings if holding.trained == trained)
