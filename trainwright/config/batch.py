"""The three sizes of a batch: rows of an optimizer step, rows of a forward pass on one rank, passes between steps."""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.base.errors import ConfigError

__all__ = ["BATCH_KEYS", "BatchSizes", "resolve_batch"]

LARGEST = 2**31 - 1
"""Rows of a batch: beyond it somebody gave tokens."""

BATCH_KEYS = ("batch.global", "batch.micro", "batch.accumulation")


@dataclass(frozen=True)
class BatchSizes:
    """Sizes that agree: global_ = micro * accumulation * ranks that have rows of their own.

    Attributes:
        global_: rows of one optimizer step on all ranks together.
        micro: rows of one forward pass on one rank (and on those that work on the same rows with it).
        accumulation: forward passes of one optimizer step on one rank.
    """

    global_: int
    micro: int
    accumulation: int


def resolve_batch(
    global_: int | None,
    micro: int | None,
    accumulation: int | None,
    world: int,
    *,
    keys: tuple[str, str, str] = BATCH_KEYS,
    all_ranks: int | None = None,
) -> BatchSizes:
    """Fill in what is missing, by DeepSpeed's rules: one missing follows from two; accumulation alone missing is 1.

    Args:
        world: ranks that share the batch, each with rows of its own.
        keys: what messages call the three sizes.
        all_ranks: for messages: how many ranks there are when several work on the same rows.

    Raises:
        ConfigError: sizes below 1, sizes that do not agree or do not divide (with the nearest that do), or neither
            `global_` nor `micro`.
    """
    for key, size in zip((*keys, "the number of ranks"), (global_, micro, accumulation, world), strict=True):
        if size is not None and not 1 <= size <= LARGEST:
            raise ConfigError(f"{key} is {size}, expected " + ("at least 1" if size < 1 else f"at most {LARGEST}"))
    if global_ is None:
        if micro is None:
            raise ConfigError(
                f"neither {keys[0]} nor {keys[1]} is given",
                hint=f"give {keys[1]}, the rows of one forward pass on one rank",
            )
        passes = accumulation or 1
        if micro * passes * world > LARGEST:
            raise ConfigError(f"{keys[1]} {micro} x {passes} x {world} ranks is more than {LARGEST} rows")
        return BatchSizes(micro * passes * world, micro, passes)
    ranks = f"{world} rank" + ("s" if world > 1 else "")
    if all_ranks is not None and all_ranks > world:
        ranks += f" with rows of their own ({all_ranks} ranks, {all_ranks // world} to the same rows)"
    if micro is not None and accumulation is not None:
        if global_ != micro * accumulation * world:
            right = micro * accumulation * world
            raise ConfigError(
                f"{keys[0]} is {global_}, and {keys[1]} {micro} x {keys[2]} {accumulation} x {ranks} is {right}",
                hint=f"use {keys[0]} {right}, or leave one of the three out",
            )
        return BatchSizes(global_, micro, accumulation)
    if micro is not None:
        passes = _divide(global_, micro * world, f"{keys[1]} {micro} x {ranks}", keys[0])
        return BatchSizes(global_, micro, passes)
    passes = accumulation or 1
    part = f"{keys[2]} {accumulation} x {ranks}" if accumulation else ranks
    return BatchSizes(global_, _divide(global_, passes * world, part, keys[0]), passes)


def _divide(global_: int, part: int, what: str, key: str) -> int:
    times, rest = divmod(global_, part)
    if rest or not times:
        near = f"use {part}" if not times else f"use {times * part} or {(times + 1) * part}"
        raise ConfigError(f"{key} {global_} is not a multiple of {what} = {part}", hint=f"{near} for {key}")
    return times
