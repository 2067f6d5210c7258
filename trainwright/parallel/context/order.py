"""Which tokens of a row each context rank holds.

Ring ranks hold two pieces each: ring rank r of n holds pieces r and 2n - 1 - r of 2n, so that under causal attention
all have the same work (the "zig-zag" order; Brandon et al., "Striped attention", arXiv 2311.09431, describe the
imbalance of plain order). Ulysses ranks see whole heads of what their group holds together, and cut that in plain
order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError

__all__ = ["SequenceOrder"]


@dataclass(frozen=True)
class SequenceOrder:
    """How `degree` context ranks divide a row. Rank = ring rank * ulysses + place in the Ulysses group.

    Args:
        degree: ranks that a row is divided over.
        ulysses: ranks that exchange heads for positions, neighbours in rank; `degree / ulysses` such groups form a
            ring. 1 is ring attention alone, `degree` is Ulysses alone.

    Raises:
        ConfigError: ulysses does not divide the degree.
    """

    degree: int
    ulysses: int = 1

    def __post_init__(self) -> None:
        if self.degree < 1 or self.ulysses < 1 or self.degree % self.ulysses:
            fitting = [str(d) for d in range(1, self.degree + 1) if self.degree % d == 0]
            raise ConfigError(
                f"parallel.ulysses {self.ulysses} does not divide parallel.context {self.degree}",
                hint=f"parallel.ulysses can be {', '.join(fitting)} or auto",
            )

    @property
    def ring(self) -> int:
        """Groups in the ring."""
        return self.degree // self.ulysses

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of: two equal pieces for each ring rank, cut for its group."""
        return self.degree if self.ring == 1 else math.lcm(2 * self.ring, self.degree)

    def problem(self, length: int) -> str | None:
        """Why rows of so many tokens cannot be divided, with the nearest lengths that can; None where they can."""
        if length > 0 and length % self.multiple == 0:
            return None
        below = length // self.multiple * self.multiple
        near = " or ".join(str(n) for n in (below, below + self.multiple) if n > 0)
        return f"rows of {length} tokens cannot be divided over parallel.context {self.degree}: use {near}"

    def check(self, length: int) -> None:
        """Raise ConfigError for rows that cannot be divided."""
        if (problem := self.problem(length)) is not None:
            what, _, near = problem.partition(": ")
            raise ConfigError(
                f"{what} (parallel.ulysses {self.ulysses}); the length must be a multiple of {self.multiple}",
                hint=f"{near} tokens (data.sequence_length)",
            )

    def ring_positions(self, place: int, length: int) -> tuple[range, ...]:
        """The positions that ring rank `place` holds together with its Ulysses group, in the order of its tensors."""
        if self.ring == 1:
            return (range(length),)
        size = length // (2 * self.ring)
        first, second = place, 2 * self.ring - 1 - place
        return (range(first * size, (first + 1) * size), range(second * size, (second + 1) * size))

    def positions(self, rank: int, length: int) -> tuple[range, ...]:
        """The positions of a row of `length` tokens that context rank `rank` holds, in the order of its tensors."""
        held = length // self.degree
        skip = rank % self.ulysses * held
        found = []
        for run in self.ring_positions(rank // self.ulysses, length):
            inside = run[skip : skip + held]
            skip, held = max(0, skip - len(run)), held - len(inside)
            found.append(inside)
        return tuple(run for run in found if len(run))

    def index(self, rank: int, length: int, device: torch.device | None = None) -> Tensor:
        """The same as one int64 tensor [length / degree]."""
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in self.positions(rank, length)])

    def row_order(self, length: int, device: torch.device | None = None) -> Tensor:
        """For tensors of all ranks joined in order of rank: where each token of the row stands in them; int64."""
        joined = torch.cat([self.index(rank, length, device) for rank in range(self.degree)])
        return joined.argsort()
