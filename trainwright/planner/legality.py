"""Whether a model and a batch can be divided as a layout says: every reason why not, and the nearest layouts that can.

`Layout` has the rules of the ranks among themselves. Here the model and the batch are added: each way of dividing says
what it needs, in the module that divides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import Layout, PipelineLayout, divisors
from trainwright.models import model_plan
from trainwright.parallel.context.problems import context_problems
from trainwright.parallel.expert.problems import expert_problems
from trainwright.parallel.pipeline.rules import pipeline_problems
from trainwright.parallel.tensor.legality import tensor_problems
from trainwright.planner.facts import BatchFacts, ModelFacts

__all__ = ["check_layout", "layout_problems", "nearest_legal"]

DEGREES = ("tensor", "context", "ulysses", "expert")


def layout_problems(layout: Layout, model: ModelFacts | None = None, batch: BatchFacts | None = None) -> list[str]:
    """Every reason why `layout` cannot train `model` in such batches; empty if it can.

    Args:
        layout: may be a `Layout.draft`.
        model, batch: None where they are not known, which leaves their rules out.
    """
    problems = layout.problems()
    if min(*(getattr(layout, name) for name in DEGREES), layout.pipeline.stages, layout.pipeline.virtual) < 1:
        return problems  # nothing more can be said of degrees below 1
    if model is not None:
        problems += _model_problems(layout, model, batch)
    if batch is not None and layout.world % (layout.tensor * layout.pipeline.stages * layout.context) == 0:
        problems += _batch_problems(layout, batch)
    return problems


def check_layout(draft: Layout, model: ModelFacts | None = None, batch: BatchFacts | None = None) -> Layout:
    """The layout itself, when it is legal.

    Raises:
        ConfigError: with every reason, and the nearest layouts on as many processes that are legal.
    """
    problems = layout_problems(draft, model, batch)
    if not problems:
        return draft
    near = nearest_legal(draft, model, batch)
    hint = f"the nearest that can: {'; or '.join(written(layout, draft) for layout in near)}" if near else None
    raise ConfigError(f"this layout cannot run on {draft.world} processes: {'; '.join(problems)}", hint=hint)


def written(layout: Layout, beside: Layout) -> str:
    """A layout as the recipe's keys that differ from another's."""
    keys = {
        "parallel.tensor": "tensor",
        "parallel.context": "context",
        "parallel.ulysses": "ulysses",
        "parallel.expert": "expert",
        "parallel.zero": "zero",
        "parallel.shard": "shard",
        "parallel.accumulate": "accumulate",
        "parallel.gather": "gather",
    }
    changes = [
        f"{key}={getattr(layout, name)}" for key, name in keys.items() if getattr(layout, name) != getattr(beside, name)
    ]
    for name in ("stages", "schedule", "virtual", "cuts"):
        value = getattr(layout.pipeline, name)
        if value != getattr(beside.pipeline, name) and not (layout.pipeline.stages == 1 and name != "stages"):
            changes.append(f"parallel.pipeline.{name}={'auto' if value is None else value}")
    return " ".join(changes) or "the layout as it is"


def nearest_legal(
    wanted: Layout, model: ModelFacts | None = None, batch: BatchFacts | None = None, *, limit: int = 3
) -> list[Layout]:
    """The legal layouts on as many ranks whose degrees are nearest to those of `wanted`, the nearest first.

    The distance adds up the ratios of the degrees (a factor of 2 on one axis is 1); where a degree cannot stay, other
    rules follow it: state stays with its stage, the schedule with its number of parts.
    """
    found: list[Layout] = []
    for _, candidate in sorted(_candidates(wanted), key=lambda pair: pair[0]):
        if not layout_problems(candidate, model, batch):
            found.append(candidate)
            if len(found) == limit:
                break
    return found


def _candidates(wanted: Layout) -> Iterator[tuple[tuple[float, ...], Layout]]:
    world = wanted.world
    for stages in divisors(world):
        for tensor in divisors(world // stages):
            data = world // (stages * tensor)
            for context, expert in product(divisors(data), divisors(data)):
                for ulysses in {_nearest(divisors(context), wanted.ulysses), context, 1}:
                    for shard in _shards(wanted, data, expert):
                        candidate = _candidate(wanted, stages, tensor, context, ulysses, expert, shard)
                        yield _distance(wanted, candidate), candidate


def _candidate(wanted: Layout, stages: int, tensor: int, context: int, ulysses: int, expert: int, shard: int) -> Layout:
    pipeline = PipelineLayout()
    if stages > 1:
        kept = wanted.pipeline
        cuts = kept.cuts if stages == kept.stages and not list(kept.problems()) else None
        pipeline = PipelineLayout(stages, kept.schedule, _virtual(kept), cuts)
    zero = wanted.zero if wanted.zero in (0, 1, 2, 3) else 1
    return Layout.draft(
        wanted.world,
        zero,
        shard,
        accumulate="local" if zero < 2 else wanted.accumulate,
        gather="step" if zero < 3 else wanted.gather,
        tensor=tensor,
        context=context,
        ulysses=ulysses,
        expert=expert,
        pipeline=pipeline,
    )


def _virtual(pipeline: PipelineLayout) -> int:
    """As many parts on a rank as were wanted, if the schedule has as many."""
    if pipeline.schedule in ("zbv", "dualpipev"):
        return 2
    return max(2, pipeline.virtual) if pipeline.schedule.startswith("interleaved") else 1


def _shards(wanted: Layout, data: int, expert: int) -> set[int]:
    if wanted.zero == 0:
        return {1}
    legal = [shard for shard in divisors(data) if shard == 1 or shard % expert == 0]
    return {_nearest(legal, wanted.shard), data}


def _nearest(choices: list[int], wanted: int) -> int:
    return min(choices, key=lambda choice: (_ratio(choice, wanted), choice))


def _ratio(one: int, other: int) -> float:
    return abs(math.log2(max(1, one) / max(1, other)))


def _distance(wanted: Layout, candidate: Layout) -> tuple[float, ...]:
    """Axes that divide the model count in full; how heads and shards follow them counts little."""
    axes = [_ratio(getattr(candidate, name), getattr(wanted, name)) for name in ("tensor", "context", "expert")]
    axes.append(_ratio(candidate.pipeline.stages, wanted.pipeline.stages))
    changed = sum(1 for axis in axes if axis)
    little = _ratio(candidate.ulysses, wanted.ulysses) + _ratio(candidate.shard, wanted.shard)
    return (sum(axes) + 0.01 * changed + 0.1 * little, changed)


def _model_problems(layout: Layout, model: ModelFacts, batch: BatchFacts | None) -> Iterator[str]:
    shape = model.shape
    config = None if shape is None else shape.config
    if layout.tensor > 1 and config is not None:
        yield from tensor_problems(model_plan(config), layout.tensor)
    if layout.tensor > 1 and batch is not None and batch.sequence_length % layout.context == 0:
        here = batch.sequence_length // layout.context
        if here % layout.tensor:
            yield f"rows of {here} tokens on a context rank cannot be divided over parallel.tensor {layout.tensor}"
    divides_heads = config is not None and config.num_heads % layout.tensor == 0
    if layout.context > 1 and divides_heads and layout.context % layout.ulysses == 0:
        length = None if batch is None else batch.sequence_length
        yield from context_problems(config, length, layout.context, layout.ulysses, tensor=layout.tensor)
    yield from _expert_problems(layout, model)
    yield from _pipeline_problems(layout, model, batch)


def _pipeline_problems(layout: Layout, model: ModelFacts, batch: BatchFacts | None) -> Iterator[str]:
    pipeline = layout.pipeline
    if pipeline.stages == 1:
        return
    passes = None if batch is None else _passes(layout, batch)
    found = pipeline_problems(
        model.layers, pipeline.stages, pipeline.schedule, passes or 1, pipeline.virtual, forward_only=passes is None
    )
    # What a schedule says of its number of parts, the layout has said already.
    said = any(pipeline.problems())
    yield from (text for text in found if not said or "blocks" in text)
    if pipeline.cuts is not None and any(cut >= model.layers for cut in pipeline.cuts):
        yield f"parallel.pipeline.cuts {list(pipeline.cuts)} go beyond the {model.layers} blocks"


def _passes(layout: Layout, batch: BatchFacts) -> int | None:
    """Micro-batches of one run of the schedule; None where the rows do not divide, which is another problem."""
    if layout.world % (layout.tensor * layout.pipeline.stages * layout.context):
        return None
    passes, rest = divmod(batch.rows, layout.rows * batch.micro_rows)
    return None if rest else batch.run or passes


def _expert_problems(layout: Layout, model: ModelFacts) -> list[str]:
    shape = model.shape
    if shape is None or not shape.experts:
        return [f"parallel.expert is {layout.expert}, but this model has no experts"] if layout.expert > 1 else []
    if shape.config is None:
        return []
    data = max(1, layout.world // (layout.tensor * layout.pipeline.stages))
    found = expert_problems(shape.config, layout.expert, data, tensor=layout.tensor, context=layout.context)
    said = set(layout.problems())  # how the degree divides the ranks, the layout has said
    return [text for text in found if text not in said]


def _batch_problems(layout: Layout, batch: BatchFacts) -> Iterator[str]:
    if batch.rows % layout.rows:
        yield f"a batch of {batch.rows} rows does not divide among {layout.rows} ranks with rows of their own"
        return
    each = batch.rows // layout.rows
    if each % batch.micro_rows:
        yield (
            f"train.micro_batch {batch.micro_rows} does not divide the {each} rows of each of {layout.rows} ranks with"
            " rows of their own"
        )
    elif layout.pipeline.stages > 1 and batch.run is not None and each // batch.micro_rows % batch.run:
        yield (
            f"parallel.pipeline.micro_batches {batch.run} does not divide the {each // batch.micro_rows} micro-batches"
            " of a step"
        )
