"""Reading a divided model as if it were whole, some rows at a time: for export in a format that knows no ranks.

Rank 0 asks for rows, the others answer until it is done. Nobody ever holds more than the rows that were asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.engine.engine import Engine
from trainwright.models.exporting import WeightSource

__all__ = ["readable_weights"]

_DONE = -1


@contextlib.contextmanager
def readable_weights(engine: Engine) -> Iterator[WeightSource | None]:
    """The model's parameters to read on rank 0; None on the others, which answer until rank 0 leaves the context.

    A collective of all ranks: each enters the context, and those that got None do nothing inside.
    """
    engine.data_parallel.drop_gathered()
    tensors = dict(engine.model.named_parameters())
    rows = _Rows(engine, list(tensors.values()))
    if not engine.ranks.is_first:
        rows.answer()
        yield None
        return
    index = {name: number for number, name in enumerate(tensors)}
    try:
        yield WeightSource(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: tensor.dtype for name, tensor in tensors.items()},
            lambda name, first, count: rows.read(index[name], first, count),
        )
    finally:
        rows.finish()


class _Rows:
    def __init__(self, engine: Engine, tensors: list[Tensor]) -> None:
        self._ranks = engine.ranks
        self._shard = engine.data_parallel.layout.shard  # rank 0's copy is divided over ranks 0 to shard - 1
        self._tensors = tensors

    def read(self, number: int, first: int, count: int) -> Tensor:
        """Rows of one tensor, on rank 0. Plain tensors are here already."""
        tensor = self._tensors[number].detach()
        if not isinstance(tensor, DTensor):
            return tensor.narrow(0, first, count) if tensor.dim() else tensor
        self._ask(number, first, count)
        return self._collect(tensor, first, count)

    def answer(self) -> None:
        """Take part in what rank 0 reads, until it is done."""
        while True:
            number, first, count = self._ask(0, 0, 0)
            if number == _DONE:
                return
            tensor = self._tensors[number].detach()
            assert isinstance(tensor, DTensor)
            self._collect(tensor, first, count)

    def finish(self) -> None:
        """Tell the others that nothing more will be asked."""
        if self._ranks.world > 1:
            self._ask(_DONE, 0, 0)

    def _ask(self, number: int, first: int, count: int) -> tuple[int, int, int]:
        request = self._ranks.broadcast_(torch.tensor([number, first, count]))
        number, first, count = request.tolist()
        return number, first, count

    def _collect(self, tensor: DTensor, first: int, count: int) -> Tensor:
        """Each owner sends its rows of [first, first + count) to all."""
        chunk = -(-tensor.shape[0] // self._shard)
        whole = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        with torch.no_grad():
            local = tensor.to_local()
        for owner in range(self._shard):
            begin = max(first, owner * chunk)
            end = min(first + count, (owner + 1) * chunk, tensor.shape[0])
            if begin >= end:
                continue
            part = whole[begin - first : end - first]
            if owner == self._ranks.rank:
                part.copy_(local[begin - owner * chunk : end - owner * chunk])
            dist.broadcast(part, dist.get_global_rank(_group(self._ranks.group), owner), group=self._ranks.group)
        return whole


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    assert group is not None, "divided tensors exist among several ranks only"
    return group
