"""The one order in which a model is divided over the ranks of a mesh and made ready to train.

    pipeline split -> tensor -> experts -> context -> feed-forward in pieces -> recompute -> compile -> ZeRO

Each step is an `apply_*` over the module that the one before left; a degree of 1 goes the same way and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Mesh
from trainwright.config import CommSection, MemorySection, ParallelSection, PrecisionSection
from trainwright.engine.assemble import hold, recompute
from trainwright.engine.compile import compile_blocks
from trainwright.engine.engine import Batch, Engine, ForwardBackward
from trainwright.engine.pipelined import Pipelined
from trainwright.engine.precision import Precision, keep_residual_fp32, wire_type
from trainwright.memory import apply_chunked_mlp
from trainwright.models import Backbone
from trainwright.parallel import DataParallel, ZeroOptions, apply_zero, blocks_of
from trainwright.parallel.context import apply_context, cut_batch
from trainwright.parallel.expert import apply_expert, expert_modules
from trainwright.parallel.pipeline import split_model
from trainwright.parallel.tensor import apply_tensor, overlap_problems, overlap_products

__all__ = ["Divided", "Sections", "divide"]


@dataclass(frozen=True)
class Sections:
    """The parts of a recipe, or of an engine's configuration, that say how a model is divided and held."""

    precision: PrecisionSection
    parallel: ParallelSection
    comm: CommSection
    memory: MemorySection


@dataclass(frozen=True)
class Divided:
    """A model in the form in which this rank trains it.

    Attributes:
        data_parallel: what ZeRO made of it.
        schedule: what carries out the passes of a step, where they are not simply one after another.
        cut: this rank's part of every row of a batch, where sequences are divided.
    """

    model: nn.Module
    data_parallel: DataParallel
    schedule: Callable[[Engine], ForwardBackward] | None
    cut: Callable[[Batch], Batch] | None


def divide(model: nn.Module, mesh: Mesh, policy: Precision, sections: Sections, *, compiled: bool = False) -> Divided:
    """Divide `model` in place; a collective of all ranks.

    Its parameters are equal on all ranks, or on the meta device: then `materialise` gives them values afterwards.

    Raises:
        ConfigError, ModelError: the model cannot be divided like this; every reason is named.
    """
    _refuse_host_parameters(sections.memory, mesh)
    _refuse_kept_head(model, sections.precision, mesh)
    split_model(model, mesh.pipeline, mesh.layout.pipeline)
    apply_tensor(model, mesh.tensor)
    apply_expert(model, mesh.expert, tensor=mesh.tensor, context=mesh.context)
    cut = _apply_context(model, mesh, compiled=compiled)
    chunks = sections.memory.mlp_chunks
    if chunks != "auto" and chunks > 1:
        apply_chunked_mlp(model, chunks, blocks=[block for _, block in blocks_of(model)])
    hold(model, policy, sections.precision, mesh.ranks)
    recompute(model, sections.memory, mesh.ranks)
    _overlap_tensor(mesh, sections.parallel.async_tensor, compiled=compiled)
    if compiled:
        compile_blocks(model)
    run = sections.parallel.pipeline.micro_batches
    together = None if isinstance(run, str) else run
    schedule = None if mesh.pipeline.size == 1 else lambda engine: Pipelined(engine, mesh, together=together)
    return Divided(model, _apply_zero(model, mesh, policy, sections), schedule, cut)


def _refuse_host_parameters(memory: MemorySection, mesh: Mesh) -> None:
    if memory.parameters == "host" and not mesh.layout.is_sharded:
        raise ConfigError(
            "memory.parameters is host, but nothing is divided: parameters are held whole on the device",
            hint="use parallel.zero=3 on two or more processes, or memory.parameters=device",
        )


def _refuse_kept_head(model: nn.Module, precision: PrecisionSection, mesh: Mesh) -> None:
    """The loss multiplies with the head's weight itself, where nothing gathers a module of its own."""
    head = model.lm_head if isinstance(model, Backbone) else None
    if head is None or not mesh.layout.is_sharded:
        return
    named = [pattern for pattern in precision.keep_fp32 if re.search(pattern, "lm_head")]
    if named:
        raise ConfigError(
            f"precision.keep_fp32 {named[0]!r} names the head, which the loss multiplies with in the compute type",
            hint="leave it out: softmax and loss are fp32 whatever the head is; or use parallel.zero=0",
        )


def _overlap_tensor(mesh: Mesh, wanted: bool | str, *, compiled: bool) -> None:
    device = mesh.ranks.device
    if wanted is True or (wanted == "auto" and not overlap_problems(mesh.tensor, device=device, compiled=compiled)):
        overlap_products(mesh.tensor, device=device, compiled=compiled)


def _apply_context(model: nn.Module, mesh: Mesh, *, compiled: bool) -> Callable[[Batch], Batch] | None:
    if mesh.context.size == 1:
        return None
    order = apply_context(model, mesh.context, ulysses=mesh.layout.ulysses, compiled=compiled)
    return lambda batch: cut_batch(batch, mesh.context, order)


def _apply_zero(model: nn.Module, mesh: Mesh, policy: Precision, sections: Sections) -> DataParallel:
    if mesh.layout.is_sharded and policy.gather_dtype is not None and isinstance(model, Backbone):
        keep_residual_fp32(model)
    options = ZeroOptions(
        wire=wire_type(sections.comm.wire, policy),
        compute=policy.gather_dtype,
        keep_fp32=sections.precision.keep_fp32,
        prefetch=sections.parallel.prefetch,
        host_parameters=sections.memory.parameters == "host",
    )
    return apply_zero(model, mesh, options, experts=[module for _, module in expert_modules(model)])
