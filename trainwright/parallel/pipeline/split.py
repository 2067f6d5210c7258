"""Cutting a model: of the whole, each rank of a pipeline keeps its blocks, the first part's the embedding, the last
part's the final norm and the head. In place, before any weight needs to exist.

A rank that holds several parts holds them in one module, as one model with some blocks missing: whatever else divides,
compiles or saves a model sees one model under its own names. Which part runs is an argument of `model.run_stage`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import PipelineLayout
from trainwright.comm.mesh import Axis
from trainwright.models import Backbone
from trainwright.parallel.pipeline.balance import balanced_cuts, block_ranges, decoder_costs, parts_of_rank
from trainwright.parallel.pipeline.hugging_face import HuggingFaceStage, hugging_face_anatomy
from trainwright.parallel.pipeline.native import NativeStage, native_anatomy
from trainwright.parallel.pipeline.parts import Anatomy, Part, Split
from trainwright.parallel.pipeline.stack import StageBlocks, StageLayers

__all__ = ["alias_parameters", "is_split", "module_names", "parameter_names", "split_model", "split_of"]


def split_model(
    model: nn.Module, axis: Axis, layout: PipelineLayout, *, costs: Sequence[float] | None = None
) -> nn.Module:
    """Keep of `model` what this rank of the pipeline computes; returns the same model.

    Works on meta tensors. Parameters keep their names: `blocks` becomes a `StageBlocks` (an `nn.ModuleDict`) of the
    original numbers; embedding, final norm and head become None (in Hugging Face models: modules without parameters)
    where no part of this rank uses them. The model gets a method `run_stage(x, batch, part)`.

    Args:
        model: a native model, or a Hugging Face causal language model whose trunk is embeddings, blocks and a norm.
        axis: the pipeline axis; of size 1 nothing is done.
        layout: schedule, parts on each rank, and cuts (None: balanced by the number of parameters of blocks and head).
        costs: of each block, in multiply-additions for a token, instead of its parameters.

    Raises:
        ConfigError: fewer blocks than parts, cuts that do not fit, or a model whose structure is not known.
    """
    if axis.size == 1:
        return model
    if is_split(model):
        raise ConfigError("this model is split already", hint="build a new one")
    anatomy = native_anatomy(model) if isinstance(model, Backbone) else hugging_face_anatomy(model)
    stack = model.get_submodule(anatomy.blocks)
    blocks = dict(stack.named_children())
    ranges = _ranges(model, anatomy, list(blocks.values()), axis, layout, costs)
    parts = tuple(Part(index, tuple(numbers), len(ranges)) for index, numbers in enumerate(ranges))
    local = tuple(parts[index] for index in parts_of_rank(layout.schedule, axis.size, layout.virtual, axis.rank))
    holds_first, holds_last = any(part.is_first for part in local), any(part.is_last for part in local)
    split = Split(
        axis.rank,
        axis.size,
        layout.schedule,
        layout.virtual,
        parts,
        local,
        anatomy,
        modules=module_names(model),
        parameters=parameter_names(model),
    )

    kept = {str(number): blocks[str(number)] for part in local for number in part.blocks}
    stack_class = StageBlocks if isinstance(model, Backbone) else StageLayers
    _replace(model, anatomy.blocks, stack_class(kept))
    gone: list[str] = []
    if not holds_first:
        gone += anatomy.before
    if not holds_last:
        gone += anatomy.after
    for name in gone:
        _replace(model, name, None)
    stage = NativeStage(model) if isinstance(model, Backbone) else HuggingFaceStage(model, anatomy, split)
    model.run_stage = stage  # type: ignore[assignment]
    model.pipeline_split = split  # type: ignore[assignment]
    return model


def is_split(model: nn.Module) -> bool:
    """Whether `split_model` has cut this model."""
    return isinstance(getattr(model, "pipeline_split", None), Split)


def split_of(model: nn.Module) -> Split:
    """How a model was cut.

    Raises:
        ConfigError: it was not.
    """
    split = getattr(model, "pipeline_split", None)
    if not isinstance(split, Split):
        raise ConfigError(f"this {type(model).__name__} is not split over a pipeline", hint="call split_model first")
    return split


def module_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of the whole model, of which this rank may hold a part."""
    if is_split(model):
        return split_of(model).modules
    return tuple(name for name, _ in model.named_modules() if name)


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the whole model, all those of tied ones among them."""
    if is_split(model):
        return split_of(model).parameters
    return tuple(name for name, _ in model.named_parameters(remove_duplicate=False))


def alias_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters of this rank's model that are copies of tied ones of the first part: {name here: name there}.

    A copy starts from the value of the name there, its gradient is summed with the one there, and it counts neither
    in norms nor in checkpoints. Empty for a model that is not split, and where both are on one rank: there they are
    one parameter.
    """
    if not is_split(model):
        return {}
    split = split_of(model)
    if split.holds_first or not split.holds_last:
        return {}
    return {alias: kept for kept, alias in split.anatomy.tied}


def _ranges(
    model: nn.Module,
    anatomy: Anatomy,
    blocks: Sequence[nn.Module],
    axis: Axis,
    layout: PipelineLayout,
    costs: Sequence[float] | None,
) -> list[range]:
    parts = axis.size * layout.virtual
    cuts = layout.cuts
    if cuts is None:
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        last_size = sum(p.numel() for p in model.get_submodule(anatomy.head).parameters())
        own, embedding, last = decoder_costs(sizes, last_size)
        cuts = balanced_cuts(own if costs is None else costs, parts, embedding=embedding, head=last)
    return block_ranges(len(blocks), parts, cuts)


def _replace(model: nn.Module, name: str, module: nn.Module | None) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
