"""How a model is cut, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Anatomy", "Part", "Split"]


@dataclass(frozen=True)
class Part:
    """One part of the model: consecutive blocks that run together.

    Attributes:
        index: its place in the model.
        blocks: the numbers of its blocks in the whole model.
        count: parts of the whole model.
    """

    index: int
    blocks: tuple[int, ...]
    count: int

    @property
    def is_first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the final norm, the head and the loss."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are, by module names.

    Attributes:
        blocks: the list of blocks.
        before: modules with parameters that only the first part needs; after: only the last.
        head: the output projection, one of `after`.
        tied: (kept, alias) names of parameters that are one in the whole model; the first part has `kept`, the last
            part `alias`.
    """

    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    head: str
    tied: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Split:
    """How a model was cut, and what this rank holds of it.

    Attributes:
        rank, ranks: this rank's place in the pipeline.
        schedule, virtual: the order of work, and the parts on each rank.
        parts: all of them; local: those of this rank, ascending.
        anatomy: the names of its modules.
        modules, parameters: all names of the whole model, of which this rank has some.
    """

    rank: int
    ranks: int
    schedule: str
    virtual: int
    parts: tuple[Part, ...]
    local: tuple[Part, ...]
    anatomy: Anatomy
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def holds_first(self) -> bool:
        """Whether this rank has the embedding."""
        return self.local[0].is_first

    @property
    def holds_last(self) -> bool:
        """Whether this rank has the head and the loss."""
        return self.local[-1].is_last
