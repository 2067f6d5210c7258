"""The structure of a mixture-of-experts model as plain data."""

from __future__ import annotations

from trainwright.models.llama.plan import plan as llama_plan
from trainwright.models.moe.config import MoEConfig
from trainwright.models.structure import ModelPlan

__all__ = ["plan"]


def plan(config: MoEConfig) -> ModelPlan:
    """Where the parts are. `linears` are those of attention and of dense layers; experts are divided by
    `parallel.expert`."""
    return llama_plan(config)
