"""How many forward passes a pipeline rank holds at once, by schedule: what its activations are multiplied by.

GPipe, arXiv 1811.06965; 1F1B and interleaved, arXiv 2104.04473; zero-bubble, arXiv 2401.10241; DualPipe-V, arXiv
2412.19437. The orders are those of torch.distributed.pipelining, against which the counts are tested.
"""

from __future__ import annotations

__all__ = ["parts_in_flight"]


def parts_in_flight(schedule: str, stages: int, virtual: int, micro_batches: int, rank: int) -> int:
    """Forward passes of one part whose activations a rank holds at the same time, at most.

    A pass is held until its weights' gradients are there: where these are computed later than its input's, what is
    held between the two is less than counted here.
    """
    passes = micro_batches * virtual
    if schedule == "gpipe":
        return passes
    if schedule == "1f1b":
        return min(passes, stages - rank)
    if schedule == "zbv":
        return min(passes, 2 * stages)
    if schedule == "dualpipev":
        return min(passes, 2 * stages + 1)
    rounds = max(1, micro_batches // stages)
    first = (virtual - 1) * (micro_batches // rounds)
    if schedule == "interleaved":
        return min(passes, first + 2 * (stages - 1 - rank) + 1)
    return min(passes, first + stages)
