"""Who writes what: every box of every tensor exactly once, and equal bytes for all ranks as far as that goes.

Every rank says which boxes of which tensors it holds; rank 0 gives each box to one of its holders. Ranks need not hold
the same tensors (stages of a pipeline do not): what is saved is the union. The outcome depends on layouts only, so it
is made once and used for every save until a layout changes.
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
from trainwright.checkpoint.merge import merged
from trainwright.checkpoint.sharding import boxes_of, local_part
from trainwright.checkpoint.storage import hash_bytes
from trainwright.checkpoint.tensors import Piece, dtype_name
from trainwright.checkpoint.tree import Json, Leaves, structure_of, with_names
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
        speakers: the first rank of each different form of the state: together they know all of its values that are no
            tensors. Rank 0 alone, where all ranks hold the same names.
    """

    names: dict[str, str]
    parts: list[Part]
    bytes_needed: int
    speakers: tuple[int, ...] = (0,)


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

    def tree(self, plan: Plan, state: Leaves) -> Json:
        """On rank 0 the tree of the whole state, as it goes into the manifest. All ranks call it, after `plan`.

        Raises:
            CheckpointError: on all ranks: values that several ranks hold are not the same.
        """
        if len(plan.speakers) == 1:
            return with_names(state.tree, plan.names) if self._agreement.leads else {}
        agreement = self._agreement
        speaks = agreement.ranks.rank in plan.speakers
        reports = agreement.collect({"failure": None, "tree": state.tree if speaks else None})
        tree, failure = {}, None
        if agreement.leads:
            failure = agreement.first_failures(reports)
            try:
                if not failure:
                    tree = merged({rank: reports[rank]["tree"] for rank in plan.speakers})
            except CheckpointError as error:
                failure = failure_of(error)
        agreement.raise_for(agreement.announce(failure))
        return with_names(tree, plan.names)

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
                    names, parts, size = plan_writes([report["layout"] for report in reports])
                    common = {"failure": None, "names": names, "bytes_needed": size, "speakers": _speakers(reports)}
                    answers = [{**common, "parts": part} for part in parts]
            except CheckpointError as error:
                failure = failure_of(error)
            if failure:
                answers = [{"failure": failure}] * agreement.ranks.world
        answer = agreement.deal(answers)
        agreement.raise_for(answer["failure"])
        mine_to_write = [(path, index) for path, index in answer["parts"]]
        return Plan(answer["names"], mine_to_write, answer["bytes_needed"], tuple(answer["speakers"]))


def _layout(state: Leaves) -> list[Json]:
    """[path, dtype, shape, boxes, the path it shares memory with or None where this rank cannot tell] per tensor."""
    rows: list[Json] = []
    for path, tensor in state.tensors.items():
        boxes = [[list(box.offset), list(box.shape)] for box in boxes_of(tensor, path)]
        rows.append([path, dtype_name(tensor, path), list(tensor.shape), boxes, state.same.get(path)])
    return rows


def _speakers(reports: Sequence[Json]) -> list[int]:
    """The first rank of each different structure."""
    first: dict[str, int] = {}
    for rank, report in enumerate(reports):
        first.setdefault("\n".join(report["structure"]), rank)
    return list(first.values())


def plan_writes(layouts: Sequence[list[Json]]) -> tuple[dict[str, str], list[list[Part]], int]:
    """Who writes what, from the layouts of all ranks: (names, parts by rank, bytes needed). Pure.

    Boxes that one rank alone holds are written there; one that several hold goes to the one with the fewest bytes so
    far, the largest first. A tensor may be known to some ranks only.

    Raises:
        CheckpointError: the ranks differ in a tensor's dtype or shape, or their parts do not make up the whole.
    """
    tables = [{row[0]: row for row in layout} for layout in layouts]
    names = _shared_names(tables)
    load = [0] * len(layouts)
    chosen: list[set[Part]] = [set() for _ in layouts]
    shared: list[tuple[int, str, list[tuple[int, int]]]] = []
    total = 1 << 20
    known = {path: (rank, row) for rank, table in reversed(list(enumerate(tables))) for path, row in table.items()}
    order = {path: position for position, path in enumerate(_in_order(tables))}
    for path in order:
        if path in names:
            continue
        rank, (_, dtype, shape, _, _) = known[path]
        size = DTYPE_BYTES[dtype]
        total += math.prod(shape) * size
        if not math.prod(shape):
            chosen[rank].add((path, -1))
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
    return names, [sorted(parts, key=lambda part: (order[part[0]], part[1])) for parts in chosen], total


def _in_order(tables: Sequence[Mapping[str, Json]]) -> list[str]:
    """The paths of all ranks together, each once, in the order of the first rank that has it."""
    return list(dict.fromkeys(path for table in tables for path in table))


def _shared_names(tables: Sequence[Mapping[str, Json]]) -> dict[str, str]:
    """path -> first path with the same memory, where every rank that can tell says so."""
    names = {}
    for path in _in_order(tables):
        told = {table[path][4] for table in tables if path in table} - {None}
        if len(told) == 1 and (first := told.pop()) != path:
            names[path] = first
    # A name is kept only if the tensor it points to is stored itself.
    return {path: first for path, first in names.items() if first not in names}


def _holders(path: str, tables: Sequence[Mapping[str, Json]]) -> dict[tuple[Json, Json], list[tuple[int, int]]]:
    """(offset, shape) of a box -> the (rank, index) that hold it; checked to make up the whole tensor."""
    having = [(rank, table[path]) for rank, table in enumerate(tables) if path in table]
    first, (_, dtype, shape, _, _) = having[0]
    holders: dict[tuple[Json, Json], list[tuple[int, int]]] = {}
    for rank, (_, other_dtype, other_shape, boxes, _) in having:
        if (other_dtype, other_shape) != (dtype, shape):
            raise CheckpointError(
                f"tensor {path!r}: rank {first} has {dtype} {shape}, rank {rank} has {other_dtype} {other_shape}",
                hint="a tensor that differs between ranks is saved under a name of its own for each rank",
            )
        for index, (offset, extent) in enumerate(boxes):
            holders.setdefault((tuple(offset), tuple(extent)), []).append((rank, index))
    held = sum(math.prod(extent) for _, extent in holders)
    if held != math.prod(shape):
        shown = "; ".join(f"{list(e)} at {list(o)} on rank {h[0][0]}" for (o, e), h in list(holders.items())[:SHOWN])
        ranks = f"{len(having)} of {len(tables)} ranks" if len(having) < len(tables) else "the ranks"
        raise CheckpointError(
            f"tensor {path!r} of shape {shape}: the parts of {ranks} do not make up the whole: {shown}"
        )
    return holders
