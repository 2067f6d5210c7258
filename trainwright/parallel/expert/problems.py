"""Over how many ranks the experts of a model can be divided, and every reason why not."""

from __future__ import annotations

from typing import Any

from trainwright.models.moe.config import MoEConfig

__all__ = ["expert_problems", "legal_expert_degrees"]


def expert_problems(config: Any, degree: int, data: int, *, tensor: int = 1, context: int = 1) -> list[str]:
    """Why a model cannot be divided over `degree` ranks of an expert axis; empty where it can.

    Args:
        config: of a native model; anything else has no experts that are known.
        data: ranks that hold the same part of the model, of which the expert axis takes its own.
        tensor, context: degrees beside it.
    """
    if degree < 1:
        return [f"parallel.expert is {degree}, expected at least 1"]
    if not isinstance(config, MoEConfig):
        if degree == 1:
            return []
        name = getattr(config, "family", None) or getattr(config, "model_type", type(config).__name__)
        return [f"parallel.expert is {degree}, but {name} is no model of the moe family: it has no experts to divide"]
    problems = []
    if config.num_experts % degree:
        problems.append(f"parallel.expert {degree} does not divide the {config.num_experts} experts of a layer")
    if data % degree:
        problems.append(f"parallel.expert {degree} does not divide the {data} data-parallel ranks")
    if config.expert_size % tensor:
        problems.append(f"parallel.tensor {tensor} does not divide the width {config.expert_size} of the experts")
    if config.capacity_factor is not None and context > 1:
        problems.append(
            f"model capacity_factor {config.capacity_factor} counts the tokens of whole rows, "
            f"which parallel.context {context} cuts"
        )
    return problems


def legal_expert_degrees(config: Any, data: int) -> list[int]:
    """Every degree that divides the data-parallel ranks and the experts, ascending; 1 is always among them."""
    return [1, *(degree for degree in range(2, data + 1) if not expert_problems(config, degree, data))]
