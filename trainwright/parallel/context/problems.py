"""Why a model, a length and a degree do not go together, all reasons at once; and how many ranks exchange heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainwright.parallel.context.order import SequenceOrder

__all__ = ["choose_ulysses", "context_problems"]


def choose_ulysses(degree: int, heads: int, kv_heads: int) -> int:
    """What `ulysses: auto` is: the most ranks that divide the degree, the query heads and the key-value heads.

    Ulysses sends less than the ring from 3 ranks on and lets each rank run the same kernels as without context
    parallelism; repeating key-value heads would send more than it saves. heads, kv_heads: those of one tensor rank.
    """
    return max(u for u in range(1, degree + 1) if degree % u == heads % u == kv_heads % u == 0)


def context_problems(
    config: Any, sequence_length: int | None, degree: int, ulysses: int | str = "auto", *, tensor: int = 1
) -> list[str]:
    """All reasons why a model of this configuration cannot train on rows divided over `degree` ranks.

    Args:
        config: a native family's configuration.
        sequence_length: tokens of a row; None leaves the reasons out that depend on it.
        ulysses: ranks that exchange heads, or "auto".
        tensor: ranks that the heads are divided over before.
    """
    if degree == 1:
        return []
    if config.head is not None:
        return ["parallel.context cuts texts, and no rank would have the whole one that a task's head scores"]
    if config.family == "bert":
        return ["parallel.context exchanges what causal attention needs, and an encoder's goes in both directions"]
    heads, kv_heads = config.num_heads // tensor, max(1, config.num_kv_heads // tensor)
    ranks = choose_ulysses(degree, heads, kv_heads) if isinstance(ulysses, str) else ulysses
    if degree % ranks:
        return [f"parallel.ulysses {ranks} does not divide parallel.context {degree}"]
    return list(_problems(config, sequence_length, SequenceOrder(degree, ranks), heads, tensor))


def _problems(config: Any, sequence_length: int | None, order: SequenceOrder, heads: int, tensor: int) -> Iterator[str]:
    if heads % order.ulysses:
        of_rank = f" of each of {tensor} tensor ranks" if tensor > 1 else ""
        yield f"parallel.ulysses {order.ulysses} does not divide the {heads} attention heads{of_rank}"
    if sequence_length is None:
        return
    if (problem := order.problem(sequence_length)) is not None:
        yield problem
    scaling = getattr(config, "rope_scaling", None)
    if scaling is not None and scaling.kind == "dynamic" and sequence_length > scaling.original_max_positions:
        yield (
            f"dynamic rotary scaling depends on the longest position, which no rank of parallel.context sees alone: "
            f"rows of at most {scaling.original_max_positions} tokens, or another scaling"
        )
