"""How optimizer state is cut into buckets that are updated one after the other, and where each piece lies in a file.

An algorithm that works number by number (AdamW, Lion, SGD) lets a large parameter be cut into slices; one that looks at
whole matrices (Muon, Adafactor) gets its parameters whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.memory.meter import local_tensor
from trainwright.memory.state_file import ALIGNMENT, round_up

__all__ = [
    "HALVES",
    "OVERRIDDEN",
    "Bucket",
    "Optimizer",
    "Piece",
    "Placed",
    "Unit",
    "is_small",
    "plan_buckets",
    "plan_pieces",
    "shadow",
]

SMALLEST_BYTES = 4096
"""Smaller state (step counters, rows of factored statistics) stays in memory."""

HALVES = (torch.bfloat16, torch.float16)

OVERRIDDEN = ("step", "step_part", "state_dict", "load_state_dict", "weights_changed")
"""Methods of an optimizer that `PlacedState` stands in for."""

SLICE_ELEMENTS = 1 << 14  # slices are multiples of this: 16 KiB at the least, so that every cut is aligned


class Optimizer(Protocol):
    """What is asked of an optimizer: `optim.GroupedOptimizer` offers it."""

    param_groups: list[dict[str, Any]]
    state: Any
    algorithms: Any

    def begin_step(self) -> None: ...

    def step_part(self, parameters: Sequence[Tensor], gradient_factor: Any = None) -> None: ...

    def materialise_state(self) -> None: ...


@dataclass(frozen=True)
class Piece:
    """One state tensor of one parameter in the file. offset: bytes, aligned."""

    key: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(eq=False)
class Placed:
    """One parameter whose state lives elsewhere.

    whole: its algorithm looks at more than this rank's part of it.
    cuttable: its numbers can be updated in slices, each with its share of every piece.
    pieces: its large state tensors.
    """

    name: str
    parameter: Tensor
    group: int
    whole: bool
    cuttable: bool
    pieces: list[Piece]

    @property
    def local(self) -> Tensor:
        """What this rank holds of it."""
        return local_tensor(self.parameter).detach()


@dataclass(frozen=True)
class Unit:
    """Numbers `start` to `stop` of a parameter's local part; a whole one may have any shape."""

    placed: Placed
    start: int
    stop: int

    @property
    def is_slice(self) -> bool:
        """Whether it is handed to the optimizer as a flat piece of a parameter that can be cut."""
        return self.placed.cuttable

    def span(self, piece: Piece) -> tuple[int, int]:
        """(offset, bytes) in the file of this unit's share of a piece."""
        if not self.is_slice:
            return piece.offset, piece.size
        return piece.offset + self.start * piece.dtype.itemsize, (self.stop - self.start) * piece.dtype.itemsize

    @property
    def bytes(self) -> int:
        return sum(round_up(self.span(piece)[1]) for piece in self.placed.pieces)


@dataclass(eq=False)
class Bucket:
    """Units whose state is in memory at the same time.

    whole: of algorithms that need whole parameters: all ranks then have the same buckets in the same order.
    """

    whole: bool
    units: list[Unit] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    @property
    def has_gradients(self) -> bool:
        return any(unit.placed.parameter.grad is not None for unit in self.units)

    def places(self) -> Iterator[tuple[Unit, Piece, int, int]]:
        """(unit, piece, buffer offset, bytes) of all state in this bucket, as it lies in a buffer."""
        place = 0
        for unit in self.units:
            for piece in unit.placed.pieces:
                size = unit.span(piece)[1]
                yield unit, piece, place, size
                place += round_up(size)

    def ranges(self) -> list[tuple[int, int, int]]:
        """(file offset, bytes, buffer offset) of transfers, neighbours joined; all aligned."""
        found: list[tuple[int, int, int]] = []
        for unit, piece, place, size in self.places():
            offset, size = unit.span(piece)[0], round_up(size)
            if found and found[-1][0] + found[-1][1] == offset:
                found[-1] = (found[-1][0], found[-1][1] + size, found[-1][2])
            else:
                found.append((offset, size, place))
        return found


def plan_pieces(optimizer: Optimizer) -> tuple[list[Placed], int]:
    """Every parameter with state worth moving, in order, and the bytes of the file. Allocates nothing.

    Left out, and with them their state in memory: parameters whose local part is not contiguous.
    """
    placed: list[Placed] = []
    offset = 0
    for index, group in enumerate(optimizer.param_groups):
        whole = bool(optimizer.algorithms[group["algorithm"]].whole)
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            local = local_tensor(parameter).detach()
            if not local.is_contiguous():
                continue
            ghost = torch.empty_like(local, device="meta")
            states = shadow(optimizer, {index: [(name, ghost)]}, {})
            states.materialise_state()
            pieces = []
            # A number's state must be found by its place, and stochastic rounding asks where a number stands.
            cuttable = not whole and not (local.dtype in HALVES and group["half_update"] == "stochastic")
            for key, tensor in states.state[ghost].items():
                if not is_small(tensor):
                    pieces.append(Piece(key, tensor.shape, tensor.dtype, offset))
                    offset += round_up(pieces[-1].size)
                    cuttable = cuttable and tensor.numel() == local.numel()
                elif tensor.ndim > 0:
                    cuttable = False
            if pieces or whole:
                placed.append(Placed(name, parameter, index, whole, cuttable, pieces))
    return placed, offset


def is_small(tensor: Tensor) -> bool:
    """Whether a state tensor stays in memory."""
    return tensor.numel() * tensor.element_size() < SMALLEST_BYTES


def plan_buckets(placed: Sequence[Placed], bucket_bytes: int) -> list[Bucket]:
    """Cut parameters into buckets of about `bucket_bytes` of state, in their order."""
    buckets: list[Bucket] = []
    filled = 0
    for one in placed:
        for unit in _units(one, bucket_bytes):
            # Whole parameters count by their global size, so that every rank cuts at the same places.
            weight = one.parameter.numel() * 4 if one.whole else unit.bytes
            if not buckets or buckets[-1].whole != one.whole or filled + weight > bucket_bytes:
                buckets.append(Bucket(one.whole))
                filled = 0
            buckets[-1].units.append(unit)
            filled += weight
    return buckets


def _units(one: Placed, bucket_bytes: int) -> list[Unit]:
    count = one.local.numel()
    if not one.cuttable or sum(piece.size for piece in one.pieces) <= bucket_bytes:
        return [Unit(one, 0, count)]
    each = bucket_bytes // sum(piece.dtype.itemsize for piece in one.pieces)
    each = max(SLICE_ELEMENTS, each // SLICE_ELEMENTS * SLICE_ELEMENTS)
    return [Unit(one, start, min(start + each, count)) for start in range(0, count, each)]


def shadow(
    optimizer: Optimizer, parameters: dict[int, list[tuple[str, Tensor]]], state: dict[Tensor, dict[str, Tensor]]
) -> Any:
    """The same optimizer over other tensors: `parameters` by group index, with their names, and `state`.

    It shares options and algorithms with the original, so that an update of a slice is the original's own update.
    """
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in OVERRIDDEN})
    twin.param_groups = [
        {
            **optimizer.param_groups[index],
            "params": [tensor for _, tensor in named],
            "param_names": [name for name, _ in named],
        }
        for index, named in parameters.items()
    ]
    twin.state = _States(state)
    return twin


class _States(dict[Tensor, dict[str, Tensor]]):
    def __missing__(self, key: Tensor) -> dict[str, Tensor]:
        self[key] = {}
        return self[key]


assert SLICE_ELEMENTS % ALIGNMENT == 0
