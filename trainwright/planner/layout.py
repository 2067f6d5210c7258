"""Which ZeRO stage, over how many ranks, and when things travel: the rules behind `parallel: auto`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from trainwright.comm.mesh import Layout
from trainwright.planner.plan import Decision

__all__ = ["LayoutChoice", "ParallelWishes", "choose_layout"]


class ParallelWishes(Protocol):
    """The `parallel` section: numbers and words where somebody decided, "auto" elsewhere."""

    @property
    def zero(self) -> Literal["auto", 0, 1, 2, 3]: ...

    @property
    def shard(self) -> int | Literal["auto"]: ...

    @property
    def accumulate(self) -> Literal["auto", "local", "sharded"]: ...

    @property
    def gather(self) -> Literal["auto", "step", "micro_batch"]: ...


@dataclass(frozen=True)
class LayoutChoice:
    """A layout, and what was decided for it with the reasons."""

    layout: Layout
    decisions: tuple[Decision, ...]


Fits = Callable[[Layout], bool]
"""Whether a layout's predicted memory fits on a rank."""


def choose_layout(
    wishes: ParallelWishes, world: int, *, accumulation: int, fits: Fits = lambda layout: True
) -> LayoutChoice:
    """Settle every "auto" of the section for `world` data-parallel ranks.

    Stages 0, 1 and 2 send the same bytes, stage 3 half as much again: so the first of stages 1, 2 and 3 that fits is
    taken. Gradients add up locally where whole ones fit, because then accumulation multiplies no traffic.

    Raises:
        ConfigError: the values that were given do not make a layout for this number of processes.
    """
    decisions: list[Decision] = []

    def settle(key: str, given: object, value: object, reason: str) -> None:
        if given == "auto":
            decisions.append(Decision(f"parallel.{key}", value, reason))

    stages = _stages(wishes, world)
    layouts = [_fill(wishes, world, stage, accumulate) for stage in stages for accumulate in _ways(wishes, stage)]
    layout = next((candidate for candidate in layouts if fits(candidate)), layouts[-1])
    settle("zero", wishes.zero, layout.zero, _why_stage(layout, world, fitting=layout is layouts[0]))
    if layout.is_sharded:
        settle("shard", wishes.shard, layout.shard, "all ranks share one copy of the state")
        if layout.zero > 1:
            reason = "a whole gradient fits" if layout.accumulate == "local" else "whole gradients do not fit"
            traffic = f"sends {layout.wire_psi(accumulation):g} Psi a step"
            settle("accumulate", wishes.accumulate, layout.accumulate, f"{reason}; {traffic}")
        if layout.zero == 3:
            settle("gather", wishes.gather, layout.gather, "whole parameters are held for a block or two at a time")
    return LayoutChoice(layout, tuple(decisions))


def _stages(wishes: ParallelWishes, world: int) -> list[int]:
    if wishes.zero != "auto":
        return [int(wishes.zero)]
    return [0] if world == 1 else [1, 2, 3]


def _ways(wishes: ParallelWishes, stage: int) -> list[str]:
    if stage < 2:
        return ["local"]
    return ["local", "sharded"] if wishes.accumulate == "auto" else [wishes.accumulate]


def _fill(wishes: ParallelWishes, world: int, stage: int, accumulate: str) -> Layout:
    shard = 1 if stage == 0 else world if wishes.shard == "auto" else wishes.shard
    gather = "step" if stage < 3 else "micro_batch" if wishes.gather == "auto" else wishes.gather
    return Layout(world, stage, shard, accumulate, gather)


def _why_stage(layout: Layout, world: int, *, fitting: bool) -> str:
    if world == 1:
        return "one process: there is nobody to divide with"
    if fitting:
        return "sends no more than stage 0 and holds 1/N of the optimizer state"
    return f"the first stage whose memory fits; {layout.describe()}"
