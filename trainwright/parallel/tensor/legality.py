"""Over how many devices a model can be divided, and every reason why not."""

from __future__ import annotations

from collections.abc import Sequence

from trainwright.models.structure import ModelPlan, SplitLinear

__all__ = ["legal_degrees", "tensor_problems"]


def tensor_problems(plan: ModelPlan, degree: int) -> list[str]:
    """Why the model cannot be divided over `degree` ranks of a tensor axis; empty where it can."""
    if degree < 1:
        return [f"parallel.tensor is {degree}, expected at least 1"]
    blocked: dict[int, list[str]] = {}
    for linear in plan.linears:
        if linear.serves is None and linear.units % degree:
            blocked.setdefault(linear.units, []).append(linear.name)
    return [
        f"parallel.tensor {degree} does not divide the {units} units of {_listed(names)}"
        for units, names in blocked.items()
    ] + _unserved(plan.linears)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _unserved(linears: Sequence[SplitLinear]) -> list[str]:
    """Linears whose units cannot be given to the units they serve."""
    units = {linear.name: linear.units for linear in linears}
    return [
        f"{linear.name} has {linear.units} units for the {units.get(linear.serves, 0)} of {linear.serves}"
        for linear in linears
        if linear.serves is not None and (units.get(linear.serves, 0) % linear.units or linear.serves not in units)
    ]


def legal_degrees(plan: ModelPlan, most: int) -> list[int]:
    """Every degree up to `most` over which the model can be divided, ascending; 1 is always among them."""
    return [1, *(degree for degree in range(2, most + 1) if not tensor_problems(plan, degree))]
