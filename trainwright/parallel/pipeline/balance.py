"""Where a stack of blocks is cut, and which rank holds which part. Pure functions of numbers.

A pipeline is as fast as its slowest part, so the largest cost of a part is what is made small. The embedding counts
with the first part and the head with the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import V_SCHEDULES

__all__ = ["balanced_cuts", "block_ranges", "decoder_costs", "parts_of_rank", "rank_of_part"]


def balanced_cuts(costs: Sequence[float], parts: int, *, embedding: float = 0.0, head: float = 0.0) -> tuple[int, ...]:
    """The first block of every part but the first, so that the most expensive part costs as little as possible.

    Of several best ways the one whose parts are the most even is taken (the smallest sum of squares). Dynamic
    programming over (blocks, parts): O(parts * blocks^2), nothing for the few hundred blocks of any model.

    Args:
        costs: of each block, in any one unit (time, parameters); none is negative.
        embedding, head: what the first and the last part cost beside their blocks, in the same unit.

    Raises:
        ConfigError: there are fewer blocks than parts.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise ConfigError(
            f"{count} blocks cannot be cut into {parts} parts of at least one block each",
            hint=f"use at most {count} parts (parallel.pipeline.stages x virtual)",
        )
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(part: int, begin: int, end: int) -> float:
        return before[end] - before[begin] + (embedding if part == 0 else 0.0) + (head if part == parts - 1 else 0.0)

    # best[end] = (largest part, sum of squares, cuts) of blocks [0, end) in `part + 1` parts
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        end: (cost_of(0, 0, end), cost_of(0, 0, end) ** 2, ()) for end in range(1, count - parts + 2)
    }
    for part in range(1, parts):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(part + 1, count - (parts - 1 - part) + 1):
            candidates = []
            for begin in range(part, end):
                largest, squares, cuts = best[begin]
                own = cost_of(part, begin, end)
                candidates.append((max(largest, own), squares + own * own, (*cuts, begin)))
            following[end] = min(candidates)
        best = following
    return best[count][2]


def block_ranges(num_blocks: int, parts: int, cuts: Sequence[int]) -> list[range]:
    """The blocks of every part.

    Args:
        cuts: the first block of every part but the first, ascending.

    Raises:
        ConfigError: the cuts are not `parts - 1` ascending numbers that leave each part a block.
    """
    edges = [0, *cuts, num_blocks]
    ascending = all(begin < end for begin, end in itertools.pairwise(edges))
    if len(cuts) != parts - 1 or not ascending:
        example = list(balanced_cuts([1.0] * num_blocks, parts)) if parts <= num_blocks else "fewer parts"
        raise ConfigError(
            f"parallel.pipeline.cuts is {list(cuts)}, expected {parts - 1} ascending numbers between 1 and "
            f"{num_blocks - 1}: the first block of every part but the first",
            hint=f"for equal parts: {example}",
        )
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]


def decoder_costs(block_parameters: Sequence[int], head_parameters: int) -> tuple[list[float], float, float]:
    """(blocks, embedding, head) in multiply-additions for one token: a matrix costs as many as it has entries.

    An embedding is a look-up, which costs nothing beside that; attention's products are left out because they are the
    same in every block.
    """
    return [float(count) for count in block_parameters], 0.0, float(head_parameters)


def parts_of_rank(schedule: str, ranks: int, virtual: int, rank: int) -> tuple[int, ...]:
    """The parts that a rank of the pipeline holds, ascending.

    Loop schedules deal them in turn (rank, rank + ranks, ...); V schedules go down and up again, so that the first and
    the last part are both on rank 0.
    """
    return tuple(part for part in range(ranks * virtual) if rank_of_part(schedule, ranks, part) == rank)


def rank_of_part(schedule: str, ranks: int, part: int) -> int:
    """The rank of the pipeline that holds a part."""
    turn, place = divmod(part, ranks)
    return ranks - 1 - place if schedule in V_SCHEDULES and turn % 2 else place
