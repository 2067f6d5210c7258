"""Refusing, before anything is allocated, what cannot fit."""

from __future__ import annotations

from torch import nn

from trainwright.base.device import free_disk_bytes
from trainwright.comm import Ranks
from trainwright.comm.layout import Layout
from trainwright.config import BatchSizes, EngineConfig
from trainwright.config.precision_section import BF16PurePrecision
from trainwright.engine.precision import Precision
from trainwright.parallel import blocks_of
from trainwright.planner import ModelFacts
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.planner.memory_fit import alternatives, memory_limits, refuse_before_allocating

__all__ = ["refuse_too_large"]


def refuse_too_large(
    model: nn.Module, settings: EngineConfig, policy: Precision, layout: Layout, ranks: Ranks, batch: BatchSizes
) -> None:
    """Compare parameters, gradients and optimizer state, which are known, with what this host has.

    Activations are the loop's matter: nobody knows its rows yet.

    Raises:
        MemoryLimitError: they cannot fit; names the nearest setting that does.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for _, block in blocks_of(model)]
    facts = ModelFacts(
        sum(p.numel() for p in model.parameters()),
        flops_per_token=0.0,
        layers=max(1, len(blocks)),
        width=0,
        vocab_size=0,
    )
    memory = MemorySettings(
        batch.micro or 1,
        1,
        micro_batches=batch.accumulation,
        precision=policy.name,
        optimizer=settings.optim.name if settings.optim is not None else "none",
        update=settings.precision.update if isinstance(settings.precision, BF16PurePrecision) else "master",
        optimizer_state=settings.memory.optimizer_state,
        parameters=settings.memory.parameters,
        host_is_device=ranks.device.type == "cpu",
        block_parameters=max(blocks, default=None),
    ).under(layout)
    folder = settings.memory.nvme_path
    nvme = folder is not None
    limits = memory_limits(
        "cuda" if ranks.device.type == "cuda" else "cpu",
        ranks_on_host=ranks.local_world,
        disk=free_disk_bytes(folder) if folder is not None else None,
    )
    refuse_before_allocating(
        predict_rank_memory(facts, memory), limits, alternatives(facts, memory, world=ranks.world, nvme=nvme)
    )
