"""Refuse before anything is allocated what cannot fit, with the sum and the nearest configuration that does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from trainwright.base.device import DeviceKind, device_facts, host_memory_limit
from trainwright.base.errors import MemoryLimitError
from trainwright.base.text import human_bytes
from trainwright.planner.division import Division
from trainwright.planner.facts import ModelFacts
from trainwright.planner.memory import MemorySettings, RankMemory, predict_rank_memory

__all__ = [
    "Alternative",
    "MemoryLimits",
    "alternatives",
    "memory_limits",
    "refuse_before_allocating",
    "shortfalls",
]

RUNTIME_BYTES = 400 << 20
"""Interpreter and libraries of one process on the host (measured: torch imported and one step taken, 0.3-0.45 GiB)."""

# Relative times of a step, for the order in which alternatives are offered, not for a prediction. Full recomputing is a
# forward pass more (4/3), by operator about half of that (planning literature); transfers over PCIe and to a disk are
# rough. ZeRO 1 and 2 send as much as stage 0, stage 3 half as much again.
_MICRO_BATCH_HALVED = 1.03
_RECOMPUTE = {"none": 1.0, "selective": 1.17, "full": 1.33}
_ZERO = {0: 1.0, 1: 1.01, 2: 1.01, 3: 1.1}
_ACCUMULATE_SHARDED = 1.1
_OFFLOAD_ACTIVATIONS = 1.15
_TENSOR = 1.1  # for each factor of 2: a whole activation eight times a block, in the way of its products
_CONTEXT = 1.05  # for each factor of 2: keys and values, beside products that grow with the square of the length
_STATE = {"device": 1.0, "host": 1.25, "nvme": 1.6}

_RECOMPUTE_ORDER = ("none", "selective", "full")
_STATE_ORDER = ("device", "host", "nvme")


@dataclass(frozen=True)
class MemoryLimits:
    """What there is, in bytes.

    device: of each rank's device; None where ranks compute in host memory. host: all memory that the processes of this
    machine may use together, the cgroup's limit included. disk: free where state would go, None where none may.
    """

    name: str
    host: int
    device: int | None = None
    disk: int | None = None
    ranks_on_host: int = 1
    runtime: int = RUNTIME_BYTES


@dataclass(frozen=True)
class Alternative:
    """Another configuration: the keys to change, and what a step would then cost beside now (1.0: the same)."""

    changes: tuple[tuple[str, str | int | bool], ...]
    memory: RankMemory
    cost: float

    def __str__(self) -> str:
        return ", ".join(f"{key}={str(value).lower()}" for key, value in self.changes)


def memory_limits(kind: DeviceKind, *, ranks_on_host: int = 1, disk: int | None = None) -> MemoryLimits:
    """The limits of this machine for devices of `kind` ("cpu", "cuda", "mps")."""
    facts = device_facts(kind)
    device = facts.memory_bytes if kind == "cuda" else None
    return MemoryLimits(facts.name, host_memory_limit(), device, disk, ranks_on_host)


def shortfalls(memory: RankMemory, limits: MemoryLimits) -> list[tuple[str, int, int]]:
    """(where, bytes needed, bytes there are) of every place in which `memory` does not fit."""
    places = []
    host = memory.host if limits.device is not None else memory.host + memory.device
    if limits.device is not None:
        places.append((limits.name, memory.device, limits.device))
    places.append(("this host", limits.ranks_on_host * (host + limits.runtime), limits.host))
    if memory.disk:
        places.append(("the disk", limits.ranks_on_host * memory.disk, limits.disk or 0))
    return [place for place in places if place[1] > place[2]]


def refuse_before_allocating(
    memory: RankMemory, limits: MemoryLimits, alternatives: Iterable[Alternative] = ()
) -> None:
    """Return if `memory` fits on every rank of this host.

    Args:
        alternatives: in the order in which they should be offered; only as many are drawn as it takes.

    Raises:
        MemoryLimitError: it does not; with the sum by kind, and the first alternative that does fit.
    """
    short = shortfalls(memory, limits)
    if not short:
        return
    parts = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in memory.kinds().items())
    lacks = "; ".join(
        f"{where} would need {human_bytes(need)} and has {human_bytes(there)}" for where, need, there in short
    )
    ranks = f"each of the {limits.ranks_on_host} ranks on this host" if limits.ranks_on_host > 1 else "the run"
    least: Alternative | None = None
    for other in alternatives:
        if not shortfalls(other.memory, limits):
            size = _sizes(other.memory, limits)
            hint = f"the nearest that fits: {other} ({size} a rank, about {other.cost:.2f}x the time)"
            raise MemoryLimitError(f"{ranks} needs about {_sizes(memory, limits)} ({parts}): {lacks}", hint=hint)
        if least is None or other.memory.device + other.memory.host < least.memory.device + least.memory.host:
            least = other
    hint = "use a smaller model, precision=bf16_pure, optim.name=adafactor or more ranks with parallel.zero=3"
    if least is not None:
        hint = f"no setting of this run fits; least takes {least} ({_sizes(least.memory, limits)} a rank). {hint}"
    raise MemoryLimitError(f"{ranks} needs about {_sizes(memory, limits)} ({parts}): {lacks}", hint=hint)


def alternatives(
    model: ModelFacts,
    settings: MemorySettings,
    *,
    world: int = 1,
    nvme: bool = False,
    divisions: Iterable[Division] = (),
) -> Iterator[Alternative]:
    """Configurations that need less than `settings` and train the same, the cheapest in time first.

    They differ in the micro-batch (the batch stays: more micro-batches), recomputing, ZeRO stage, accumulation, where
    activations and optimizer state are, and over how many ranks the model is divided.

    Args:
        world: all ranks.
        nvme: whether a folder for state on disk is given.
        divisions: other degrees that are legal.
    """
    found = []
    for division in (settings.division, *divisions):
        divided = _under(settings, division, world)
        found += list(_under_one_division(model, settings, divided, world, nvme))
    yield from sorted(found, key=lambda one: (round(one.cost, 4), len(one.changes)))


def _under(settings: MemorySettings, division: Division, world: int) -> MemorySettings:
    """The same batch with the model divided otherwise: fewer ranks have rows of their own, and each gets more."""
    before = settings.division
    if division == before:
        return settings
    data = max(1, world // (division.tensor * division.stages))
    more = division.same_rows / before.same_rows
    shard = min(settings.shard, data)
    return replace(
        settings,
        division=division,
        micro_batches=max(1, round(settings.micro_batches * more)),
        shard=shard if data % shard == 0 else data,
    )


def _under_one_division(
    model: ModelFacts, before: MemorySettings, settings: MemorySettings, world: int, nvme: bool
) -> Iterator[Alternative]:
    division = settings.division
    data = max(1, world // (division.tensor * division.stages))
    choices = product(
        _micro_rows(settings),
        _later(_RECOMPUTE_ORDER, settings.recompute),
        range(settings.zero, 4) if data > 1 else (settings.zero,),
        ("local", "sharded"),
        (False, True) if not settings.host_is_device else (settings.offload_activations,),
        _states(settings, nvme),
    )
    for rows, recompute, zero, accumulate, offload, place in choices:
        if accumulate != settings.accumulate and (zero < 2 or accumulate == "local"):
            continue
        other = replace(
            settings,
            micro_rows=rows,
            micro_batches=settings.micro_batches * settings.micro_rows // rows,
            recompute=recompute,
            zero=zero,
            shard=max(settings.shard, data) if zero > 0 and settings.zero == 0 else settings.shard,
            gather="micro_batch" if zero == 3 and settings.zero != 3 else settings.gather,
            accumulate=accumulate,
            offload_activations=offload or settings.offload_activations,
            optimizer_state=place,
        )
        changes = _changes(before, other)
        if changes:
            cost = _cost(other) / _cost(before) * _MICRO_BATCH_HALVED ** _halvings(settings.micro_rows, rows)
            yield Alternative(changes, predict_rank_memory(model, other), cost)


def _micro_rows(settings: MemorySettings) -> list[int]:
    rows = [settings.micro_rows]
    while rows[-1] > 1:
        rows.append(next(r for r in range(rows[-1] // 2, 0, -1) if settings.micro_rows % r == 0))
    return rows


def _later(order: tuple[str, ...], value: str | int) -> tuple[str | int, ...]:
    if isinstance(value, int):  # every n-th block: between none and full
        return (value, "selective", "full")
    return order[order.index(value) :]


def _states(settings: MemorySettings, nvme: bool) -> list[str]:
    order = _STATE_ORDER[_STATE_ORDER.index(settings.optimizer_state) :]
    return [
        place
        for place in order
        if place == settings.optimizer_state
        or (place == "host" and not settings.host_is_device)
        or (place == "nvme" and nvme)
    ]


def _halvings(before: int, after: int) -> int:
    return max(0, (before // after).bit_length() - 1)


def _cost(settings: MemorySettings) -> float:
    recompute = settings.recompute
    again = 1 + 0.33 / recompute if isinstance(recompute, int) else _RECOMPUTE[recompute]
    several = settings.micro_batches > 1 and settings.accumulate == "sharded"
    division = settings.division
    waits = (division.stages - 1) / division.virtual / settings.micro_batches
    return (
        again
        * _TENSOR ** math.log2(division.tensor)
        * _CONTEXT ** math.log2(division.context)
        * (1 + waits)
        * _ZERO[settings.zero]
        * (_ACCUMULATE_SHARDED if several else 1.0)
        * (_OFFLOAD_ACTIVATIONS if settings.offload_activations else 1.0)
        * _STATE[settings.optimizer_state]
    )


def _changes(before: MemorySettings, after: MemorySettings) -> tuple[tuple[str, str | int | bool], ...]:
    degrees = {
        "parallel.tensor": "tensor",
        "parallel.context": "context",
        "parallel.pipeline.stages": "stages",
    }
    changed = [
        (key, getattr(after.division, name))
        for key, name in degrees.items()
        if getattr(after.division, name) != getattr(before.division, name)
    ]
    keys = {
        "train.micro_batch": "micro_rows",
        "memory.recompute": "recompute",
        "parallel.zero": "zero",
        "parallel.accumulate": "accumulate",
        "memory.offload_activations": "offload_activations",
        "memory.optimizer_state": "optimizer_state",
    }
    changed += [
        (key, getattr(after, name)) for key, name in keys.items() if getattr(after, name) != getattr(before, name)
    ]
    return tuple(changed)


def _sizes(memory: RankMemory, limits: MemoryLimits) -> str:
    if limits.device is None:
        return human_bytes(memory.device + memory.host)
    return human_bytes(memory.device) + (f" and {human_bytes(memory.host)} on the host" if memory.host else "")
