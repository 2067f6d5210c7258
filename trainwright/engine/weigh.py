"""Refusing, before anything is allocated, what cannot fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainwright.base.device import free_disk_bytes
from trainwright.comm import Ranks
from trainwright.comm.layout import Layout
from trainwright.config import BatchSizes, EngineConfig
from trainwright.config.precision_section import BF16PurePrecision
from trainwright.engine.precision import Precision
from trainwright.models import Backbone
from trainwright.models.adapters.linear import AdaptedLinear, held_types
from trainwright.parallel import blocks_of
from trainwright.planner import ModelFacts
from trainwright.planner.holdings import Held, Training
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.planner.memory_fit import alternatives, memory_limits, refuse_before_allocating
from trainwright.planner.trained import Places, holdings_of, places_of

__all__ = ["refuse_too_large"]

TYPE_NAMES: dict[torch.dtype, Held] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def refuse_too_large(
    model: nn.Module, settings: EngineConfig, policy: Precision, layout: Layout, ranks: Ranks, batch: BatchSizes
) -> None:
    """Compare parameters, gradients and optimizer state, which are known, with what this host has; parameters that
    require no gradient have neither.

    Activations are the loop's matter: nobody knows its rows yet.

    Raises:
        MemoryLimitError: they cannot fit; names the nearest setting that does.
    """
    blocks = blocks_of(model)
    sizes = [sum(p.numel() for p in block.parameters()) for _, block in blocks]
    total = sum(p.numel() for p in model.parameters())
    places = places_of(model.config) if isinstance(model, Backbone) else Places(tuple(name for name, _ in blocks))
    training = Training(
        holdings_of(model, places, _held(model)),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=total,
        flops=0.0,
    )
    facts = ModelFacts(total, flops_per_token=0.0, layers=max(1, len(blocks)), width=0, vocab_size=0, training=training)
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
        block_parameters=max(sizes, default=None),
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


def _held(model: nn.Module) -> Callable[[str], Held]:
    """How the parameters of a live model stay when it is cast: frozen weights beside adapters may keep their type."""
    kept: dict[str, Held] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            for leaf in held_types(module):
                if (parameter := module._parameters.get(leaf)) is not None:
                    kind = "nf4" if module.weight_scale is not None else TYPE_NAMES.get(parameter.dtype, "policy")
                    kept[f"{prefix}.{leaf}"] = kind
    return lambda name: kept.get(name, "policy")
