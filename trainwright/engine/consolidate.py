"""Reading a divided model as if it were whole, some rows at a time: for export in a format that knows no ranks.

Rank 0 asks for rows; those that hold parts of them send these, until it is done. However parameters are divided over
shards, tensor and expert ranks, and whichever stage of a pipeline has them: one rank answers for each part. Nobody ever
holds more than the rows that were asked for.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.agreement import Agreement, failure_of
from trainwright.checkpoint.sharding import boxes_of, local_part
from trainwright.checkpoint.tensors import dtype_name, torch_dtype
from trainwright.comm import Ranks
from trainwright.comm.boxes import Box, narrow
from trainwright.engine.engine import Engine
from trainwright.models.exporting import WeightSource
from trainwright.models.weights import kept_tensors
from trainwright.parallel.pipeline import alias_parameters

__all__ = ["readable_weights"]

_DONE = -1


@contextlib.contextmanager
def readable_weights(engine: Engine) -> Iterator[WeightSource | None]:
    """The model's parameters and kept buffers to read on rank 0; None on the others, which answer until rank 0 leaves
    the context.

    A collective of all ranks: each enters the context, and those that got None do nothing inside. What rank 0 reads is
    on the host where other ranks take part.

    Raises:
        CheckpointError: on all ranks: the ranks do not hold parts of one model.
    """
    engine.data_parallel.drop_gathered()
    aliases = alias_parameters(engine.model)  # copies of what another stage of the pipeline answers for
    tensors = {name: t.detach() for name, t in kept_tensors(engine.model).items() if name not in aliases}
    parts = _Parts(engine.ranks, tensors)
    if not engine.ranks.is_first:
        parts.answer()
        yield None
        return
    try:
        yield WeightSource(
            {name: entry.shape for name, entry in parts.entries.items()},
            {name: entry.dtype for name, entry in parts.entries.items()},
            parts.read,
        )
    finally:
        parts.finish()


@dataclass(frozen=True)
class _Entry:
    """A parameter as rank 0 knows it: its place among all, and (rank, box) of each of its parts."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[int, Box], ...]


class _Parts:
    """Who answers for what, as agreed by all ranks when it is made."""

    def __init__(self, ranks: Ranks, tensors: dict[str, Tensor]) -> None:
        self._ranks = ranks
        self._locals = {name: local_part(tensor) for name, tensor in tensors.items()}
        self._boxes = {name: boxes_of(tensor, name) for name, tensor in tensors.items()}
        agreement = Agreement(ranks)
        held = [
            [name, list(tensor.shape), dtype_name(tensor, name), [[b.offset, b.shape] for b in self._boxes[name]]]
            for name, tensor in tensors.items()
        ]
        reports = agreement.collect({"failure": None, "held": held})
        self.entries: dict[str, _Entry] = {}
        answers: list[Any] = []
        if agreement.leads:
            failure = agreement.first_failures(reports)
            try:
                self.entries = {} if failure else _assigned([report["held"] for report in reports])
            except CheckpointError as error:
                failure = failure_of(error)
            answers = [{"failure": failure, "mine": []} for _ in range(ranks.world)]
            for name, entry in self.entries.items():
                for rank, box in entry.parts:
                    answers[rank]["mine"].append([entry.number, name, box.offset])
        answer = agreement.deal(answers)
        agreement.raise_for(answer["failure"])
        # number -> (name, box) of what this rank answers for, in the order in which rank 0 expects it.
        self._mine: dict[int, list[tuple[str, Box]]] = {}
        for number, name, offset in answer["mine"]:
            self._mine.setdefault(number, []).append((name, self._own(name, tuple(offset))))

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Rows of one parameter, on rank 0; a view of its own memory where it has all of them."""
        entry = self.entries[name]
        asked = [(rank, box, found) for rank, box in entry.parts if (found := _overlap(box, first, count)) is not None]
        if len(asked) == 1 and asked[0][0] == 0:
            return self._piece(name, self._own(name, asked[0][1].offset), asked[0][2])
        if any(rank for rank, _, _ in asked):
            self._ask(entry.number, first, count)
        shape = (count, *entry.shape[1:]) if entry.shape else ()
        rows = torch.empty(shape, dtype=entry.dtype)
        for rank, box, (start, size) in asked:
            offset, extent = box.offset, box.shape
            if extent:
                offset, extent = (start - first, *offset[1:]), (size, *extent[1:])
            piece = torch.empty(extent, dtype=entry.dtype)
            if rank:
                dist.recv(_bytes(piece), group=self._ranks.host_group, group_src=rank)
            else:
                piece = self._piece(name, self._own(name, box.offset), (start, size))
            narrow(rows, offset, extent).copy_(piece)
        return rows

    def answer(self) -> None:
        """Send rank 0 what it asks for, until it is done."""
        while True:
            number, first, count = self._ask(0, 0, 0)
            if number == _DONE:
                return
            for name, box in self._mine.get(number, []):
                found = _overlap(box, first, count)
                if found is not None:
                    piece = self._piece(name, box, found).cpu().contiguous()
                    dist.send(_bytes(piece), group=self._ranks.host_group, group_dst=0)

    def finish(self) -> None:
        """Tell the others that nothing more will be asked."""
        if self._ranks.world > 1:
            self._ask(_DONE, 0, 0)

    def _ask(self, number: int, first: int, count: int) -> tuple[int, int, int]:
        # To all, though few will answer: who hears nothing for long believes that rank 0 is lost.
        number, first, count = self._ranks.broadcast_(torch.tensor([number, first, count])).tolist()
        return number, first, count

    def _own(self, name: str, offset: tuple[int, ...]) -> Box:
        """The box that begins there, as it lies in this rank's part."""
        return next(box for box in self._boxes[name] if box.offset == offset)

    def _piece(self, name: str, box: Box, rows: tuple[int, int]) -> Tensor:
        """These rows of a box of this rank."""
        local = self._locals[name]
        if not box.shape:
            return local
        start, size = rows
        return narrow(local, (start - box.offset[0] + box.at[0], *box.at[1:]), (size, *box.shape[1:]))


def _overlap(box: Box, first: int, count: int) -> tuple[int, int] | None:
    """(first, count) of the rows of a box among those asked for; scalars are one row."""
    begin, size = (box.offset[0], box.shape[0]) if box.shape else (0, 1)
    start, stop = max(first, begin), min(first + count, begin + size)
    return (start, stop - start) if start < stop else None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _assigned(held: Sequence[Any]) -> dict[str, _Entry]:
    """The parameters of all ranks in the order of the model; each part belongs to the first rank that has it. Pure.

    Raises:
        CheckpointError: shapes or types differ between ranks, or parts do not make up the whole.
    """
    facts: dict[str, tuple[int, tuple[int, ...], str]] = {}
    parts: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], int]] = {}
    for rank, entries in enumerate(held):
        for name, shape, dtype, boxes in entries:
            known, *same = facts.setdefault(name, (rank, tuple(shape), dtype))
            if same != [tuple(shape), dtype]:
                raise CheckpointError(
                    f"parameter {name} is {same[1]} {list(same[0])} on rank {known}, {dtype} {shape} on rank {rank}"
                )
            for offset, extent in boxes:
                parts.setdefault(name, {}).setdefault((tuple(offset), tuple(extent)), rank)
    found = {}
    for number, name in enumerate(_in_model_order(list(facts))):
        _, shape, dtype = facts[name]
        boxes = parts.get(name, {})
        if sum(math.prod(extent) for _, extent in boxes) != math.prod(shape):
            raise CheckpointError(f"parameter {name} of shape {list(shape)}: the ranks do not hold all of it")
        places = tuple((rank, Box(offset, extent, (0,) * len(extent))) for (offset, extent), rank in boxes.items())
        found[name] = _Entry(number, shape, torch_dtype(dtype), places)
    return found


def _in_model_order(names: Sequence[str]) -> list[str]:
    """Names of several stages one after the other, put into the order of the model: blocks by number, where the first
    of them stands; what was in order stays as it is."""
    first: dict[str, int] = {}

    def place(position: int, name: str) -> tuple[int, int, int]:
        numbered = re.match(r"(.*?)\.(\d+)\.", name)
        prefix, number = (numbered[1], int(numbered[2])) if numbered else (name, 0)
        return first.setdefault(prefix, position), number, position

    return [name for _, name in sorted((place(i, name), name) for i, name in enumerate(names))]
