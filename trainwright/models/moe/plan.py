"""The structure of a mixture-of-experts model as plain data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trainwright.models.llama.plan import plan as llama_plan
from trainwright.models.moe.config import MoEConfig
from trainwright.models.structure import ModelPlan, SplitLinear

__all__ = ["plan"]

_MLP: tuple[tuple[str, Literal["column", "row"]], ...] = (
    ("gate_proj", "column"),
    ("up_proj", "column"),
    ("down_proj", "row"),
)


def plan(config: MoEConfig) -> ModelPlan:
    """Where the parts are. `linears` are those of attention, of dense layers and of shared experts; a block has either
    of the last two. Routed experts are divided by `parallel.expert`, over a tensor axis too."""
    base = llama_plan(config)
    shared = tuple(
        SplitLinear(f"mlp.shared_expert.{name}", kind, config.shared_size) for name, kind in _MLP if config.shared_size
    )
    dense = tuple(linear for linear in base.linears if config.dense_layers or not linear.name.startswith("mlp."))
    return dataclasses.replace(base, linears=dense + shared)
