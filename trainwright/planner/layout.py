"""From the `parallel` section to a layout: degrees, ZeRO stage, shards, when things travel; every "auto" settled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, Protocol

from trainwright.comm.layout import Layout, PipelineLayout, divisors
from trainwright.config.pipeline_section import parts_per_rank
from trainwright.models import model_plan
from trainwright.parallel.context.problems import choose_ulysses
from trainwright.parallel.tensor.legality import tensor_problems
from trainwright.planner.facts import BatchFacts, ModelFacts
from trainwright.planner.legality import check_layout, layout_problems
from trainwright.planner.plan import Decision

__all__ = ["Degrees", "LayoutChoice", "ParallelWishes", "choose_layout", "degree_candidates", "other_degrees"]

Degree = int | Literal["auto"]

OPEN = ("auto", "auto", "auto")


class PipelineWishes(Protocol):
    """The `parallel.pipeline` section."""

    @property
    def stages(self) -> Degree: ...

    @property
    def schedule(self) -> str: ...

    @property
    def virtual(self) -> Degree: ...

    @property
    def cuts(self) -> tuple[int, ...] | Literal["auto"]: ...


class ParallelWishes(Protocol):
    """The `parallel` section: numbers and words where somebody decided, "auto" elsewhere."""

    @property
    def zero(self) -> Literal["auto", 0, 1, 2, 3]: ...

    @property
    def shard(self) -> Degree: ...

    @property
    def accumulate(self) -> Literal["auto", "local", "sharded"]: ...

    @property
    def gather(self) -> Literal["auto", "step", "micro_batch"]: ...

    @property
    def tensor(self) -> Degree: ...

    @property
    def async_tensor(self) -> bool | Literal["auto"]: ...

    @property
    def context(self) -> Degree: ...

    @property
    def ulysses(self) -> Degree: ...

    @property
    def expert(self) -> Degree: ...

    @property
    def pipeline(self) -> PipelineWishes: ...


@dataclass(frozen=True)
class Degrees:
    """Over how many ranks the model, its sequences and its experts are divided."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    stages: int = 1

    @property
    def same_rows(self) -> int:
        """Ranks that work on the same rows."""
        return self.tensor * self.context * self.stages


@dataclass(frozen=True)
class LayoutChoice:
    """A layout, and what was decided for it with the reasons."""

    layout: Layout
    decisions: tuple[Decision, ...]


Fits = Callable[[Layout], bool]
"""Whether a layout's predicted memory fits on a rank."""


def degree_candidates(
    wishes: ParallelWishes, world: int, *, model: ModelFacts | None = None, ranks_on_host: int | None = None
) -> list[Degrees]:
    """The degrees that the section leaves open, in the order in which they are tried; one entry where none is open.

    Few ranks to the same rows come first; of equally many, tensor ranks of one host, which have the fastest wires and
    wait for nobody, then context ranks, then experts, then stages.
    """
    given = (wishes.tensor, wishes.context, wishes.expert, wishes.pipeline.stages)
    if "auto" not in given:
        return [Degrees(*(int(degree) for degree in given))]
    shape = None if model is None else model.shape
    most = (
        ranks_on_host or world,
        world,
        world if shape is not None and shape.experts else 1,
        world if model is None else model.layers,
    )
    choices = [
        [degree for degree in divisors(world) if degree <= limit] if wish == "auto" else [int(wish)]
        for wish, limit in zip(given, most, strict=True)
    ]
    if wishes.tensor == "auto" and shape is not None and shape.config is not None:
        plan = model_plan(shape.config)
        choices[0] = [degree for degree in choices[0] if not tensor_problems(plan, degree)]
    found = [Degrees(*degrees) for degrees in product(*choices)]
    found = [one for one in found if world % one.same_rows == 0] or found[:1]
    return sorted(found, key=lambda one: (one.same_rows * one.expert, -one.tensor, -one.context, -one.expert))


def choose_layout(
    wishes: ParallelWishes,
    world: int,
    *,
    accumulation: int,
    degrees: Degrees | None = None,
    model: ModelFacts | None = None,
    batch: BatchFacts | None = None,
    fits: Fits = lambda layout: True,
) -> LayoutChoice:
    """Settle every "auto" of the section for `world` processes.

    Stages 0, 1 and 2 send the same bytes, stage 3 half as much again: so the first of stages 1, 2 and 3 that fits is
    taken. Gradients add up locally where whole ones fit, because then accumulation multiplies no traffic.

    Args:
        accumulation: micro-batches of a step, of which the reasons tell the traffic.
        degrees: those of a candidate of `degree_candidates`; None takes the given ones, and 1 for what is open.
        model, batch: what the layout is checked against; None checks the ranks among themselves.

    Raises:
        ConfigError: the values that were given do not make a layout for this number of processes, model and batch;
            with every reason and the nearest layouts that do.
    """
    degrees = degrees or degree_candidates(wishes, world)[0]
    layouts = [
        _draft(wishes, world, degrees, model, stage, accumulate)
        for stage in _stages(wishes, world, degrees)
        for accumulate in _ways(wishes, stage)
    ]
    legal = [layout for layout in layouts if not layout_problems(layout, model, batch)]
    if not legal:
        check_layout(layouts[0], model, batch)
    layout = next((candidate for candidate in legal if fits(candidate)), legal[-1])
    return LayoutChoice(
        layout,
        (
            *_degree_decisions(wishes, layout),
            *_state_decisions(wishes, layout, world, accumulation, fitting=layout is legal[0]),
        ),
    )


def other_degrees(layout: Layout, model: ModelFacts | None, batch: BatchFacts) -> list[Layout]:
    """Legal layouts like this one that divide the model over more ranks: what may fit where this one does not."""
    found = []
    rows = batch.rows // batch.micro_rows
    for tensor, context, stages in product(*(divisors(layout.world) for _ in range(3))):
        degrees = Degrees(tensor, context, layout.expert, stages)
        before = (layout.tensor, layout.context, layout.pipeline.stages)
        if min(a >= b for a, b in zip((tensor, context, stages), before, strict=True)) and degrees.same_rows <= rows:
            data = max(1, layout.world // (tensor * stages))
            kept = layout.pipeline
            pipeline = kept if stages == kept.stages else replace(kept, stages=stages, cuts=None)
            ulysses = layout.ulysses if context == layout.context else math.gcd(context, layout.ulysses)
            other = Layout.draft(
                layout.world,
                layout.zero if data > 1 else 0,
                min(layout.shard, data) if data > 1 else 1,
                accumulate=layout.accumulate if data > 1 else "local",
                gather=layout.gather if data > 1 else "step",
                tensor=tensor,
                context=context,
                ulysses=ulysses,
                expert=layout.expert,
                pipeline=pipeline,
            )
            if other != layout and not layout_problems(other, model, batch):
                found.append(other)
    return found


def _stages(wishes: ParallelWishes, world: int, degrees: Degrees) -> list[int]:
    if wishes.zero != "auto":
        return [int(wishes.zero)]
    if world == 1:
        return [0]
    alone = world <= degrees.tensor * degrees.stages and (wishes.shard, wishes.accumulate, wishes.gather) == OPEN
    return [0] if alone else [1, 2, 3]


def _ways(wishes: ParallelWishes, stage: int) -> list[str]:
    if stage < 2:
        return ["local"]
    return ["local", "sharded"] if wishes.accumulate == "auto" else [wishes.accumulate]


def _draft(
    wishes: ParallelWishes, world: int, degrees: Degrees, model: ModelFacts | None, stage: int, accumulate: str
) -> Layout:
    data = max(1, world // (degrees.tensor * degrees.stages))
    section = wishes.pipeline
    pipeline = PipelineLayout()
    if degrees.stages > 1:
        virtual = parts_per_rank(section.schedule, section.virtual)
        cuts = None if section.cuts == "auto" else tuple(section.cuts)
        pipeline = PipelineLayout(degrees.stages, section.schedule, virtual, cuts)
    return Layout.draft(
        world,
        stage,
        1 if stage == 0 else data if wishes.shard == "auto" else wishes.shard,
        accumulate=accumulate,
        gather="step" if stage < 3 else "micro_batch" if wishes.gather == "auto" else wishes.gather,
        tensor=degrees.tensor,
        context=degrees.context,
        ulysses=_ulysses(wishes, degrees, model),
        expert=degrees.expert,
        pipeline=pipeline,
    )


def _ulysses(wishes: ParallelWishes, degrees: Degrees, model: ModelFacts | None) -> int:
    if degrees.context == 1:
        return 1
    if wishes.ulysses != "auto":
        return wishes.ulysses
    shape = None if model is None else model.shape
    if shape is None:
        return 1  # a ring asks nothing of the heads
    heads, kv_heads = (max(1, count // degrees.tensor) for count in (shape.heads, shape.kv_heads))
    return choose_ulysses(degrees.context, heads, kv_heads)


def _degree_decisions(wishes: ParallelWishes, layout: Layout) -> list[Decision]:
    """What became of open degrees; keys that a degree of 1 leaves without effect go with it."""
    found: list[Decision] = []
    follows = {"tensor": ("async_tensor", wishes.async_tensor), "context": ("ulysses", wishes.ulysses)}
    for name in ("tensor", "context", "expert"):
        if getattr(wishes, name) != "auto":
            continue
        degree = getattr(layout, name)
        found.append(Decision(f"parallel.{name}", degree, _why_degree(degree)))
        key, value = follows.get(name, ("", "auto"))
        if degree == 1 and value != "auto":
            found.append(Decision(f"parallel.{key}", None, f"parallel.{name} became 1"))
    if wishes.pipeline.stages == "auto":
        stages = layout.pipeline.stages
        whole = Decision("parallel.pipeline", {"stages": 1}, _why_degree(1))
        cut = Decision("parallel.pipeline.stages", stages, _why_degree(stages))
        found.append(whole if stages == 1 else cut)
    if layout.context > 1 and wishes.ulysses == "auto":
        reason = "the most ranks that divide query and key-value heads; what is left of the degree is a ring"
        found.append(Decision("parallel.ulysses", layout.ulysses, reason))
    section = wishes.pipeline
    if layout.pipeline.virtual > 1 and section.virtual == "auto" and section.schedule.startswith("interleaved"):
        found.append(
            Decision(
                "parallel.pipeline.virtual", layout.pipeline.virtual, "each part more on a rank sends as much again"
            )
        )
    return found


def _why_degree(degree: int) -> str:
    return "not needed" if degree == 1 else "the smallest degree whose predicted memory fits"


def _state_decisions(
    wishes: ParallelWishes, layout: Layout, world: int, accumulation: int, *, fitting: bool
) -> list[Decision]:
    given = {name: getattr(wishes, name) for name in ("zero", "shard", "accumulate", "gather")}
    found = {"zero": _why_stage(layout, world, fitting=fitting)}
    if layout.is_sharded:
        found["shard"] = "all ranks share one copy of the state"
        if layout.data < world:
            found["shard"] = "all ranks that hold the same part of the model share one copy of its state"
        if layout.zero > 1:
            reason = "a whole gradient fits" if layout.accumulate == "local" else "whole gradients do not fit"
            found["accumulate"] = f"{reason}; sends {layout.wire_psi(accumulation):g} Psi a step"
        if layout.zero == 3:
            found["gather"] = "whole parameters are held for a block or two at a time"
    return [
        Decision(f"parallel.{name}", getattr(layout, name), reason)
        for name, reason in found.items()
        if given[name] == "auto"
    ]


def _why_stage(layout: Layout, world: int, *, fitting: bool) -> str:
    if world == 1:
        return "one process: there is nobody to divide with"
    if layout.data == 1:
        return "no two ranks hold the same part of the model"
    if fitting:
        return "sends no more than stage 0 and holds 1/N of the optimizer state"
    return f"the first stage whose memory fits; {layout.describe()}"
