"""Bytes that one rank sends in a step, by axis: the textbook volumes of each way of dividing a model.

ZeRO, arXiv 1910.02054, section 7; tensor and sequence parallelism, arXiv 2205.05198, section 4.2.2; Ulysses, arXiv
2309.14509, section 3.2; ring attention, arXiv 2310.01889; experts, arXiv 2006.16668. A ring collective of V bytes over
n ranks sends V (n - 1) / n from each to gather or to scatter, twice that to sum.
"""

from __future__ import annotations

import math

from trainwright.comm.layout import Layout
from trainwright.planner.division import held_parts, rank_part, shape_of
from trainwright.planner.facts import ModelFacts
from trainwright.planner.memory import MemorySettings, frozen_widths, state_widths

__all__ = ["wire_bytes"]

WIRE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
AGAIN = {"none": 1.0, "selective": 1.25, "full": 1.5}
"""What recomputing sends beside a forward and a backward pass, relative to them: selective what enters a linear."""


def wire_bytes(model: ModelFacts, settings: MemorySettings, layout: Layout, *, wire: str = "auto") -> dict[str, int]:
    """Axis -> bytes that a rank in the middle of the pipeline sends per optimizer step; axes that send nothing are not
    named.

    Args:
        settings: sizes of the passes, number formats and recomputing; its division is the layout's.
        wire: the type in which gradients travel; auto is the one in which they were computed.
    """
    element = 4.0 if settings.precision == "fp32" else 2.0
    stage = layout.pipeline.stages // 2
    part = rank_part(model, settings.division, stage, block=settings.block_parameters)
    tokens = settings.micro_rows * settings.sequence_length / layout.context  # of one pass, on one context rank
    hidden = tokens * model.width * element
    # A rank's blocks each see every micro-batch; a recomputed block sends what its forward pass sends once more.
    passes = settings.micro_batches * part.layers
    recompute = settings.recompute
    again = 1.0 + 0.5 / recompute if isinstance(recompute, int) else AGAIN[recompute]
    gradient = WIRE_BYTES.get(wire, element)
    found = {
        "state": _state(model, gradient, settings, layout, stage),
        "tensor": again * passes * 8 * hidden * _others(layout.tensor),
        "context": passes * _context(model, settings, layout, element) * tokens,
        "expert": again * passes * _experts(model, layout, hidden),
        "pipeline": _pipeline(settings, layout, hidden),
    }
    return {axis: round(size) for axis, size in found.items() if size > 0}


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def _state(model: ModelFacts, gradient: float, settings: MemorySettings, layout: Layout, stage: int) -> float:
    """Gradients and parameters between the ranks that hold the same part of the model: all are gathered, and only the
    trained ones have gradients."""
    if layout.data == 1:
        return 0.0
    parts = held_parts(model, settings.division, stage, block=settings.block_parameters)
    trained = sum(part.total for part in parts if part.trained)
    if not layout.is_sharded:
        return 2 * gradient * trained * _others(layout.data)
    widths = state_widths(settings.precision, settings.optimizer, update=settings.update, sharded=True)
    frozen = {part.held: frozen_widths(part.held, settings.precision, sharded=True) for part in parts}
    gathered = sum((widths if part.trained else frozen[part.held]).whole * part.total for part in parts)
    gathers = 1 if layout.gather == "step" else 2 * settings.micro_batches
    reductions = 1 if layout.accumulate == "local" else settings.micro_batches
    inside = (gathers * gathered + reductions * gradient * trained) * _others(layout.shard)
    across = 2 * gradient * reductions * trained / layout.shard * _others(layout.replicas)
    return inside + across


def _context(model: ModelFacts, settings: MemorySettings, layout: Layout, element: float) -> float:
    """Per token of a context rank, block and micro-batch: heads are exchanged for positions, then keys and values go
    round the ring."""
    shape = shape_of(model, settings.block_parameters)
    queries = shape.heads // layout.tensor
    keys = max(1, shape.kv_heads // layout.tensor)
    repeated = math.lcm(keys, layout.ulysses)  # heads that the ranks do not divide are repeated until they do
    # q, k, v to heads and the output back; their gradients the other way.
    exchanged = 2 * (2 * queries + 2 * repeated) * element * _others(layout.ulysses)
    # k and v forward and once more backward, and their gradients, which are sums in fp32: ring - 1 hops each.
    ring = layout.context // layout.ulysses
    sent = 2 * repeated * (2 * element + 4.0) * (ring - 1)
    return shape.head_width * (exchanged + sent)


def _experts(model: ModelFacts, layout: Layout, hidden: float) -> float:
    """One block, one micro-batch: tokens to their experts and back, gradients likewise (evenly spread routing)."""
    shape = model.shape
    if shape is None or not shape.experts:
        return 0.0
    return 4 * hidden / layout.tensor * shape.experts_per_token * _others(layout.expert)


def _pipeline(settings: MemorySettings, layout: Layout, hidden: float) -> float:
    """Outputs to the next part and gradients to the one before, for every part of a rank in the middle."""
    if layout.pipeline.stages == 1:
        return 0.0
    return 2 * settings.micro_batches * layout.pipeline.virtual * hidden / layout.tensor
