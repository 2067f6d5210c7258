"""Who writes what: every box of every tensor exactly once, and equal bytes for all ranks as far as that goes.

Every rank says which boxes of which tensors it holds; rank 0 gives each box to one of its holders. The outcome depends
on layouts only, so it is made once and used for every save until a layout changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.agreement import Agreement, failure_of
from trainwright.checkpoint.manifest import DTYPE_BYTES
from trainwright.checkpoint.sharding import boxes_of, local_part
from trainwright.checkpoint.storage import hash_bytes
from trainwright.checkpoint.tensors import Piece, dtype_name
from trainwright.checkpoint.tree import Json, Leaves, structure_of
from trainwright.comm.boxes import narrow

__all__ = ["Plan", "Planner", "pieces_of", "plan_writes"]

Part = tuple[str, int]
"""(path of a tensor, index of one of the boxes that this rank holds); -1 for a tensor without elements."""

SHOWN = 8


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Attributes:
        names: path -> the name under which a tensor is stored, for those that share memory with an earlier one.
        parts: what this rank writes, in the order of the state.
        bytes_needed: of all ranks together, with padding and manifest.
    """

    names: dict[str, str]
    parts: list[Part]
    bytes_needed: int


def pieces_of(tensors: Mapping[str, torch.Tensor], plan: Plan) -> list[Piece]:
    """The pieces that this rank writes, as views of its local parts: nothing is copied."""
    pieces = []
    for path, index in plan.parts:
        tensor = tensors[path]
        shape, local = tuple(tensor.shape), local_part(tensor)
        if index < 0:
            pieces.append(Piece(path, shape, (0,) * len(shape), torch.empty(shape, dtype=tensor.dtype)))
            continue
        box = boxes_of(tensor, path)[index]
        pieces.append(Piece(path, shape, box.offset, narrow(local, box.at, box.shape)))
    return pieces


class Planner:
    """Makes the plan together with the other ranks, and keeps it as long as nothing but values changes."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._digest = ""
        self._plan: Plan | None = None

    def plan(self, step: int, state: Leaves | Exception) -> Plan:
        """The plan for this state. All ranks call it; one that has no state to save passes the reason.

        Raises:
            CheckpointError: on all ranks: a rank failed before, or the ranks do not hold parts of one state.
        """
        agreement = self._agreement
        layout, structure, error = [], [], None
        try:
            if isinstance(state, Exception):
                raise state
            layout, structure = _layout(state), structure_of(state.tree)
        except Exception as caught:  # whatever it is, the others must hear of it
            error = caught
        digest = hash_bytes(json.dumps([layout, structure]).encode())
        known = self._plan is not None and digest == self._digest
        reports = agreement.collect({"failure": failure_of(error) if error else None, "step": step, "known": known})
        answer: Json = None
        if agreement.leads:
            failure = agreement.first_failures(reports) or self._other_steps(reports)
            answer = {"failure": failure, "known": not failure and all(report["known"] for report in reports)}
        answer = agreement.announce(answer)
        agreement.raise_for(answer["failure"], error)
        if not answer["known"]:
            self._plan = self._make({"layout": layout, "structure": structure})
            self._digest = digest
        assert self._plan is not None
        return self._plan

    def _other_steps(self, reports: Sequence[Json]) -> Json:
        steps = [report["step"] for report in reports]
        if len(set(steps)) == 1:
            return None
        return failure_of(CheckpointError(f"the ranks do not save the same step: {steps} (by rank)"))

    def _make(self, mine: Json) -> Plan:
        """Exchange the layouts and plan; the slow way, taken when something other than values has changed."""
        agreement = self._agreement
        reports = agreement.collect({"failure": None, **mine})
        answers: list[Json] = []
        if agreement.leads:
            failure = agreement.first_failures(reports)
            try:
                if not failure:
                    _check_same_structure([report["structure"] for report in reports], agreement)
                    names, parts, size = plan_writes([report["layout"] for report in reports])
                    answers = [{"failure": None, "names": names, "parts": part, "bytes_needed": size} for part in parts]
            except CheckpointError as error:
                failure = failure_of(error)
            if failure:
                answers = [{"failure": failure}] * agreement.ranks.world
        answer = agreement.deal(answers)
        agreement.raise_for(answer["failure"])
        mine_to_write = [(path, index) for path, index in answer["parts"]]
        return Plan(answer["names"], mine_to_write, answer["bytes_needed"])


def _layout(state: Leaves) -> list[Json]:
    """[path, dtype, shape, boxes, the path it shares memory with or None where this rank cannot tell] per tensor."""
    rows: list[Json] = []
    for path, tensor in state.tensors.items():
        boxes = [[list(box.offset), list(box.shape)] for box in boxes_of(tensor, path)]
        rows.append([path, dtype_name(tensor, path), list(tensor.shape), boxes, state.same.get(path)])
    return rows


def _check_same_structure(structures: Sequence[list[str]], agreement: Agreement) -> None:
    """The values of rank 0 are saved, so every rank must have the same places for them."""
    first = set(structures[0])
    for rank, lines in enumerate(structures):
        if lines == structures[0]:
            continue
        here = set(lines)
        odd = [f"  only on {agreement.name(0)}: {line}" for line in structures[0] if line not in here]
        odd += [f"  only on {agreement.name(rank)}: {line}" for line in lines if line not in first]
        odd = odd or ["  the same names in another order"]
        more = [f"  and {len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
        raise CheckpointError(
            "\n".join(["the ranks do not have the same state to save:", *odd[:SHOWN], *more]),
            hint="every rank passes a state of the same names; what only one rank has stands in it on all, as None",
        )


def plan_writes(layouts: Sequence[list[Json]]) -> tuple[dict[str, str], list[list[Part]], int]:
    """Who writes what, from the layouts of all ranks: (names, parts by rank, bytes needed). Pure.

    Boxes that one rank alone holds are written there; one that several hold goes to the one with the fewest bytes so
    far, the largest first.

    Raises:
        CheckpointError: the ranks differ in a tensor's dtype or shape, or their parts do not make up the whole.
    """
    tables = [{row[0]: row for row in layout} for layout in layouts]
    names = _shared_names(tables)
    load = [0] * len(layouts)
    chosen: list[set[Part]] = [set() for _ in layouts]
    shared: list[tuple[int, str, list[tuple[int, int]]]] = []
    total = 1 << 20
    for path, dtype, shape, _, _ in layouts[0]:
        if path in names:
            continue
        size = DTYPE_BYTES[dtype]
        total += math.prod(shape) * size
        if not math.prod(shape):
            chosen[0].add((path, -1))
        for extent, holders in _holders(path, tables).items():
            count = math.prod(extent[1]) * size
            total += 5120  # padding, and a kilobyte of manifest, which is three times what one chunk takes
            if len(holders) > 1:
                shared.append((count, path, holders))
            else:
                rank, index = holders[0]
                chosen[rank].add((path, index))
                load[rank] += count
    for count, path, holders in sorted(shared, key=lambda item: -item[0]):
        rank, index = min(holders, key=lambda holder: load[holder[0]])
        chosen[rank].add((path, index))
        load[rank] += count
    order = {row[0]: position for position, row in enumerate(layouts[0])}
    return names, [sorted(parts, key=lambda part: (order[part[0]], part[1])) for parts in chosen], total


def _shared_names(tables: Sequence[Mapping[str, Json]]) -> dict[str, str]:
    """path -> first path with the same memory, where every rank that can tell says so."""
    names = {}
    for path in tables[0]:
        told = {table[path][4] for table in tables} - {None}
        if len(told) == 1 and (first := told.pop()) != path:
            names[path] = first
    # A name is kept only if the tensor it points to is stored itself.
    return {path: first for path, first in names.items() if first not in names}


def _holders(path: str, tables: Sequence[Mapping[str, Json]]) -> dict[tuple[Json, Json], list[tuple[int, int]]]:
    """(offset, shape) of a box -> the (rank, index) that hold it; checked to make up the whole tensor."""
    _, dtype, shape, _, _ = tables[0][path]
    holders: dict[tuple[Json, Json], list[tuple[int, int]]] = {}
    for rank, table in enumerate(tables):
        _, other_dtype, other_shape, boxes, _ = table[path]
        if (other_dtype, other_shape) != (dtype, shape):
            raise CheckpointError(
                f"tensor {path!r}: rank 0 has {dtype} {shape}, rank {rank} has {other_dtype} {other_shape}",
                hint="a tensor that differs between ranks is saved under a name of its own for each rank",
            )
        for index, (offset, extent) in enumerate(boxes):
            holders.setdefault((tuple(offset), tuple(extent)), []).append((rank, index))
    held = sum(math.prod(extent) for _, extent in holders)
    if held != math.prod(shape):
        shown = "; ".join(f"{list(e)} at {list(o)} on rank {h[0][0]}" for (o, e), h in list(holders.items())[:SHOWN])
        raise CheckpointError(
            f"tensor {path!r} of shape {shape}: the parts of the ranks do not make up the whole: {shown}"
        )
    return holders
