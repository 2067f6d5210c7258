"""Orders of work: torch's schedule classes, built for a run, or asked what they would do without any process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import V_SCHEDULES
from trainwright.parallel.pipeline.balance import parts_of_rank
from trainwright.parallel.pipeline.rules import pipeline_problems

__all__ = ["Order", "build_schedule", "order_of_work"]

Order = list[tuple[str, int, int]]
"""(kind, part, micro-batch) one after another; kinds are F, B, I and W."""

_ONE_PART = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_SEVERAL_PARTS = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved_zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def build_schedule(
    name: str,
    stages: Sequence[Any],
    micro_batches: int,
    loss: Callable[..., Any],
    *,
    forward_only: bool = False,
) -> Any:
    """The torch schedule of that name over a rank's stages. Gradients stay sums: nothing is divided by micro-batches.

    forward_only: an order for evaluation with the same placement, for any number of micro-batches.

    Raises:
        ConfigError: the schedule cannot run so, with every reason.
    """
    ranks, virtual = stages[0].group_size, len(stages)
    problems = pipeline_problems(ranks * virtual, ranks, name, micro_batches, virtual, forward_only=forward_only)
    if problems:
        raise ConfigError(
            f"this pipeline cannot run {micro_batches} micro-batches: " + "; ".join(problems),
            hint="change parallel.pipeline.micro_batches, batch.micro or parallel.pipeline.schedule",
        )
    if name in _ONE_PART:
        kind = ScheduleGPipe if forward_only else _ONE_PART[name]
        return kind(stages[0], micro_batches, loss, scale_grads=False)
    if forward_only:
        several: Any = ScheduleZBVZeroBubble if name in V_SCHEDULES else ScheduleLoopedBFS
    else:
        several = _SEVERAL_PARTS[name]
    return several(list(stages), micro_batches, loss, scale_grads=False)


def order_of_work(name: str, ranks: int, virtual: int, micro_batches: int) -> dict[int, Order]:
    """By rank, everything that it computes, in order.

    Pure: no process group is needed. Raises ConfigError as `build_schedule` does.
    """
    stages = [
        SimpleNamespace(
            num_stages=ranks * virtual,
            group_size=ranks,
            group_rank=0,
            stage_index=part,
            submod=None,
            stage_index_to_group_rank={},
        )
        for part in parts_of_rank(name, ranks, virtual, 0)
    ]
    schedule = build_schedule(name, stages, micro_batches, lambda *_: None)
    if name == "1f1b":  # what torch 2.13 says of it misses the last rank's first micro-batch; what it does is right
        return {rank: _one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)}
    orders: dict[int, Order] = {}
    for rank, actions in schedule.pipeline_order.items():
        flat = [inner for action in actions if action is not None for inner in (action.sub_actions or (action,))]
        known = [(action.computation_type.value, action.stage_index, action.microbatch_index) for action in flat]
        orders[rank] = [action for action in known if action[0] in "FBIW"]
    return orders


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Order:
    ahead = min(micro_batches, ranks - rank)
    order: Order = [("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append(("B", rank, number))
        if ahead + number < micro_batches:
            order.append(("F", rank, ahead + number))
    return order
