"""What of a model one rank holds under tensor, expert and pipeline parallelism, in parameters.

Tensor: arXiv 1909.08053, with norms whole on every rank (arXiv 2205.05198), and the projections to keys and values too
where their heads do not divide. Pipeline: whole blocks; the embedding with the first, the head with the last, and a
tied matrix with both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from trainwright.comm.layout import Layout
from trainwright.parallel.pipeline.balance import balanced_cuts, block_ranges, parts_of_rank
from trainwright.planner.facts import ModelFacts, ModelShape
from trainwright.planner.holdings import BlockSizes, Held, Holding

__all__ = ["Division", "HeldPart", "RankPart", "held_parts", "rank_part", "shape_of"]


@dataclass(frozen=True)
class Division:
    """Degrees that divide the model, under the names of the recipe's keys; `context` divides activations alone."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    stages: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    cuts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, layout: Layout) -> Division:
        """How a layout divides the model."""
        pipeline = layout.pipeline
        degrees = (layout.tensor, layout.context, layout.expert)
        return cls(*degrees, pipeline.stages, pipeline.schedule, pipeline.virtual, pipeline.cuts)

    @property
    def parts(self) -> int:
        """Parts that the pipeline cuts the model into."""
        return self.stages * self.virtual

    @property
    def same_rows(self) -> int:
        """Ranks that work on the same rows."""
        return self.tensor * self.context * self.stages

    @property
    def divides_parameters(self) -> bool:
        """Whether ranks hold different parameters."""
        return max(self.tensor, self.expert, self.stages) > 1


@dataclass(frozen=True)
class RankPart:
    """Parameters that a rank works with, before ZeRO divides them.

    Attributes:
        dense, experts: all of them.
        block: of one block, experts included.
        rest: outside blocks.
        layers: blocks, on all its parts together.
        kept_layers: of these, those that keep activations; part_layers: likewise, in the largest part.
    """

    dense: float
    experts: float
    block: float
    rest: float
    layers: int
    kept_layers: int
    part_layers: int

    @property
    def parameters(self) -> float:
        return self.dense + self.experts


@dataclass(frozen=True)
class HeldPart:
    """What a rank works with of a `Holding`, before ZeRO divides it: in parameters, of `nf4` in bytes.

    block: the most that one block has. rest: outside blocks.
    """

    trained: bool
    held: Held
    dense: float
    experts: float
    block: float
    rest: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


def shape_of(model: ModelFacts, block: int | None = None) -> ModelShape:
    """The model's shape, or an estimate where nobody looked inside: one tied matrix, and blocks that divide evenly."""
    if model.shape is not None:
        return model.shape
    words = model.vocab_size * model.width
    if block is None:
        block = max(0, model.parameters - words) // max(1, model.layers)
    return ModelShape(
        heads=1,
        kv_heads=1,
        head_width=model.width,
        mlp_width=0,
        block=block,
        block_whole=0,
        block_kv=0,
        embedding=words,
        head=words,
        tied=True,
    )


@lru_cache(maxsize=256)
def blocks_of_parts(layers: int, parts: int, block: int, head: int, cuts: tuple[int, ...] | None) -> tuple[int, ...]:
    """Blocks of every part, along the model: by the cuts, or balanced by the cost of blocks and head.

    More parts than blocks are priced too, some of them empty: that this is illegal, the layout says with all else.
    """
    if parts > layers:
        return (1,) * layers + (0,) * (parts - layers)
    if cuts is None:
        cuts = balanced_cuts([float(block)] * layers, parts, head=float(head))
    return tuple(len(part) for part in block_ranges(layers, parts, cuts))


def rank_part(model: ModelFacts, division: Division, stage: int = 0, *, block: int | None = None) -> RankPart:
    """What a rank of pipeline stage `stage` holds of `model`.

    Args:
        block: parameters of the largest block, where that is known better than by the average.
    """
    shape = shape_of(model, block)
    dense_block, expert_block = _block(_of_one_block(shape), shape.kv_heads, division)
    mine = _blocks_of(model, shape, division, stage)
    first_kept = 0 if model.training is None else model.training.first_kept
    kept = [sum(number >= first_kept for number in part) for part in mine.values()]
    first, last = 0 in mine, division.parts - 1 in mine
    rest = (shape.embedding / division.tensor + shape.positions) * first + shape.head / division.tensor * last
    if first and last and shape.tied:
        rest -= min(shape.embedding, shape.head) / division.tensor
    held = sum(len(part) for part in mine.values())
    layers = {"layers": held, "kept_layers": sum(kept), "part_layers": max(kept)}
    if not division.divides_parameters:
        # The whole model: its number of parameters is known, whatever the blocks are estimated at.
        experts = model.layers * expert_block
        return RankPart(model.parameters - experts, experts, dense_block + expert_block, rest, **layers)
    return RankPart(
        dense=held * dense_block + rest,
        experts=held * expert_block,
        block=dense_block + expert_block,
        rest=rest,
        **layers,
    )


def held_parts(model: ModelFacts, division: Division, stage: int = 0, *, block: int | None = None) -> list[HeldPart]:
    """What a rank of pipeline stage `stage` works with, by whether it is trained and how it is held.

    Args:
        block: see `rank_part`, which is asked where nobody looked inside.
    """
    if model.training is None:
        part = rank_part(model, division, stage, block=block)
        return [HeldPart(True, "policy", part.dense, part.experts, part.block, part.rest)]
    shape = shape_of(model, block)
    mine = _blocks_of(model, shape, division, stage)
    first, last = 0 in mine, division.parts - 1 in mine
    numbers = [number for part in mine.values() for number in part]
    return [_held_part(holding, shape, division, numbers, first, last) for holding in model.training.holdings]


def _held_part(
    holding: Holding, shape: ModelShape, division: Division, numbers: list[int], first: bool, last: bool
) -> HeldPart:
    blocks = [_block(holding.blocks[number], shape.kv_heads, division) for number in numbers if holding.blocks]
    rest = (holding.embedding / division.tensor + holding.positions) * first
    rest += (holding.head / division.tensor + holding.top) * last
    if first and last and holding.tied:
        rest -= min(holding.embedding, holding.head) / division.tensor
    return HeldPart(
        holding.trained,
        holding.held,
        dense=sum(dense for dense, _ in blocks) + rest,
        experts=sum(experts for _, experts in blocks),
        block=max((dense + experts for dense, experts in blocks), default=0.0),
        rest=rest,
    )


def _blocks_of(model: ModelFacts, shape: ModelShape, division: Division, stage: int) -> dict[int, range]:
    """Part of the model that a rank holds -> numbers of its blocks."""
    layers = blocks_of_parts(model.layers, division.parts, shape.block, shape.head, division.cuts)
    mine = parts_of_rank(division.schedule, division.stages, division.virtual, stage) if division.stages > 1 else (0,)
    return {part: range(sum(layers[:part]), sum(layers[: part + 1])) for part in mine}


def _of_one_block(shape: ModelShape) -> BlockSizes:
    return BlockSizes(shape.block, shape.block_whole, shape.block_kv, shape.block_experts)


def _block(block: BlockSizes, kv_heads: int, division: Division) -> tuple[float, float]:
    """(dense, expert) numbers that a rank holds of one block."""
    tensor = division.tensor
    matrices = block.total - block.whole - block.kv - block.experts
    keys = block.kv / tensor if kv_heads % tensor == 0 else block.kv
    return block.whole + matrices / tensor + keys, block.experts / (division.expert * tensor)
