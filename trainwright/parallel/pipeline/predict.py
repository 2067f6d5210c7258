"""What a schedule should do: the share of a step in which ranks wait, as a formula and by its order run on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainwright.base.errors import ConfigError
from trainwright.parallel.pipeline.orders import Order, order_of_work
from trainwright.parallel.pipeline.trace import Action, idle_share

__all__ = ["bubble_share", "predicted_actions"]


def bubble_share(schedule: str, stages: int, micro_batches: int, virtual: int = 1) -> float:
    """The share of a step in which a rank waits: equal parts, W = I = F for the two halves of the backward pass, and
    messages that take no time. The same on every rank.

    With p ranks, m micro-batches and v parts on each rank, a rank works 3vm units (F, I, W). It waits 3(p - 1) units in
    GPipe (arXiv 1811.06965), 1F1B and interleaved 1F1B (arXiv 2104.04473, where a unit is 1/v as long); p - 1 in the
    zero-bubble orders (arXiv 2401.10241), whose W fill the rest: what remains is that ranks begin one after another and
    all wait for the last at the end of a step. These hold from p micro-batches on (zbv: 2p - 1); for fewer the order is
    run on paper.

    Raises:
        ConfigError: the schedule cannot run so.
    """
    if stages == 1:
        return 0.0
    if schedule not in ("gpipe", "1f1b") and micro_batches < (2 * stages - 1 if schedule == "zbv" else stages):
        seconds = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
        return idle_share(predicted_actions(schedule, stages, micro_batches, virtual, seconds=seconds))[0]
    work = 3 * virtual * micro_batches
    waits = (stages - 1) * (3 if schedule in ("gpipe", "1f1b", "interleaved") else 1)
    return waits / (work + waits)


def predicted_actions(
    schedule: str,
    stages: int,
    micro_batches: int,
    virtual: int = 1,
    *,
    seconds: Callable[[str, int], float] | Mapping[str, float],
    message: float = 0.0,
) -> list[Action]:
    """When every rank would do what, starting at 0: the order of the schedule, each action as soon as it can be.

    Args:
        seconds: of an action, by kind (F, B, I, W), or by (kind, part) where parts differ.
        message: seconds from the end of an action to its use on another rank.

    Raises:
        ConfigError: the schedule cannot run so, or its order never ends.
    """
    cost = seconds if callable(seconds) else lambda kind, _: seconds[kind]
    orders = order_of_work(schedule, stages, virtual, micro_batches)
    rank_of = {part: rank for rank, order in orders.items() for _, part, _ in order}
    ended: dict[tuple[str, int, int], float] = {}
    clock = dict.fromkeys(orders, 0.0)
    waiting: dict[int, Order] = {rank: list(order) for rank, order in orders.items()}
    actions = []
    while any(waiting.values()):
        ready = [
            rank for rank, order in waiting.items() if order and _needs(order[0], stages * virtual) <= ended.keys()
        ]
        if not ready:
            raise ConfigError(f"the order of {schedule} on {stages} ranks never ends: every rank waits for another")
        for rank in ready:
            kind, part, number = waiting[rank].pop(0)
            arrivals = [
                ended[need] + (message if rank_of[need[1]] != rank else 0.0)
                for need in _needs((kind, part, number), stages * virtual)
            ]
            start = max([clock[rank], *arrivals])
            clock[rank] = start + cost(kind, part)
            ended["I" if kind == "B" else kind, part, number] = clock[rank]
            actions.append(Action(kind, part, number, start, clock[rank], rank))
    return actions


def _needs(action: tuple[str, int, int], parts: int) -> set[tuple[str, int, int]]:
    """What must have ended before; the backward pass of inputs stands for a whole one too."""
    kind, part, number = action
    if kind == "F":
        return {("F", part - 1, number)} if part else set()
    if kind == "W":
        return {("I", part, number)}
    return {("F", part, number)} if part == parts - 1 else {("F", part, number), ("I", part + 1, number)}
