"""When a pipeline schedule can run: every reason against it at once. Pure."""

from __future__ import annotations

from trainwright.comm.layout import SCHEDULES, V_SCHEDULES

__all__ = ["pipeline_problems"]


def pipeline_problems(
    num_blocks: int, stages: int, schedule: str, micro_batches: int, virtual: int = 1, *, forward_only: bool = False
) -> list[str]:
    """Everything that keeps `num_blocks` blocks from running on `stages` ranks; empty where they can.

    Args:
        stages: ranks along the pipeline.
        schedule: one of `comm.layout.SCHEDULES`.
        micro_batches: those of one optimizer step on this pipeline.
        virtual: parts of the model on each rank.
        forward_only: evaluation, which any number of micro-batches can do.
    """
    if stages < 1 or virtual < 1:
        return [f"a pipeline of {stages} ranks with {virtual} parts on each: both must be at least 1"]
    if schedule not in SCHEDULES:
        return [f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}"]
    if stages == 1:
        return []
    return [
        *_placement_problems(num_blocks, stages, schedule, virtual),
        *([] if forward_only else _order_problems(stages, schedule, micro_batches, virtual)),
    ]


def _placement_problems(num_blocks: int, stages: int, schedule: str, virtual: int) -> list[str]:
    problems = []
    parts = stages * virtual
    if parts > num_blocks:
        problems.append(f"{num_blocks} blocks cannot be cut into {stages} x {virtual} = {parts} parts")
    if schedule in V_SCHEDULES and virtual != 2:
        problems.append(f"{schedule} goes down the ranks and up again: 2 parts on each rank, not {virtual}")
    if schedule.startswith("interleaved") and virtual < 2:
        problems.append(f"{schedule} interleaves at least 2 parts on each rank, and virtual is {virtual}")
    if schedule in ("gpipe", "1f1b") and virtual != 1:
        problems.append(f"{schedule} has 1 part on each rank, and virtual is {virtual}")
    return problems


def _order_problems(stages: int, schedule: str, micro_batches: int, virtual: int) -> list[str]:
    if micro_batches < 1:
        return [f"{micro_batches} micro-batches: at least 1 is needed"]
    if schedule == "1f1b" and micro_batches < stages:
        return [f"1f1b keeps {stages} ranks busy with as many micro-batches, and a step has only {micro_batches}"]
    if schedule == "dualpipev" and micro_batches < 2 * stages:
        return [f"dualpipev needs a micro-batch for each of its {2 * stages} parts, and a step has {micro_batches}"]
    if schedule.startswith("interleaved"):
        rounds = max(1, micro_batches // stages)
        if micro_batches % rounds:
            near = [
                m for m in range(micro_batches - stages, micro_batches + stages) if m > 0 and _interleaves(m, stages)
            ]
            return [
                f"{schedule} deals the micro-batches of a step in {rounds} equal rounds, and {micro_batches} do not "
                f"divide; near: {', '.join(map(str, near))}"
            ]
    return []


def _interleaves(micro_batches: int, stages: int) -> bool:
    return micro_batches % max(1, micro_batches // stages) == 0
