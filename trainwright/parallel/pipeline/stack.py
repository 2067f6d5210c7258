"""The blocks of a model that this rank holds, under the numbers that they have in the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["StageBlocks", "StageLayers"]


class StageBlocks(nn.ModuleDict):
    """Blocks by their number in the whole model, so that no parameter changes its name.

    A rank may hold several parts of the model that run at different times: inside `only(...)` the children are those
    of one part.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(dict(blocks))
        self._chosen: frozenset[str] | None = None

    @contextlib.contextmanager
    def only(self, numbers: Collection[int]) -> Iterator[None]:
        """Inside, children are the blocks with these numbers."""
        before, self._chosen = self._chosen, frozenset(map(str, numbers))
        try:
            yield
        finally:
            self._chosen = before

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks of the part that runs, or all outside of `only`, in order."""
        for name, block in super().named_children():
            if self._chosen is None or name in self._chosen:
                yield name, block


class StageLayers(StageBlocks):
    """The same for Hugging Face models, whose forward passes go through a list: iterated, indexed and sliced."""

    def __iter__(self) -> Iterator[Any]:
        return iter([block for _, block in self.named_children()])

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else list(self)[key]
