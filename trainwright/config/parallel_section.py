"""`parallel`: how the state of training is spread over the ranks (ZeRO, arXiv 1910.02054) and when it is gathered."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from trainwright.config.fields import Auto, Whole, Words
from trainwright.config.section import Section

__all__ = ["Parallel", "ParallelSection"]

Stage: TypeAlias = Literal["auto", 0, 1, 2, 3]


class ParallelSection(Section):
    """How parameters, gradients and optimizer state are spread over the ranks."""

    zero: Annotated[Stage, Words(("auto", 0, 1, 2, 3))] = "auto"
    """What is sharded: 0 nothing; 1 optimizer state; 2 gradients too; 3 parameters too; auto by the memory."""
    shard: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Ranks that share one copy of the state; fewer than all is hybrid: shard inside a group, replicate across."""
    accumulate: Annotated[Literal["auto", "local", "sharded"], Words(("auto", "local", "sharded"))] = "auto"
    """Gradients between micro-batches: whole on each rank and sent once, or sent and sharded after each."""
    gather: Annotated[Literal["auto", "step", "micro_batch"], Words(("auto", "step", "micro_batch"))] = "auto"
    """Sharded parameters are gathered once for a step and kept, or for each micro-batch and freed again."""
    prefetch: Annotated[int, Whole()] = 1
    """Blocks whose parameters are gathered ahead of their use."""

    def without_effect(self) -> dict[str, str]:
        if self.zero == 0:
            return dict.fromkeys(
                ("shard", "accumulate", "gather", "prefetch"), "parallel.zero is 0: nothing is sharded"
            )
        idle = {}
        if self.zero == 1:
            idle["accumulate"] = "parallel.zero is 1: gradients are whole on each rank"
        if self.zero in (1, 2):
            idle["gather"] = f"parallel.zero is {self.zero}: parameters are gathered once for a step"
        return idle


def _auto(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value != "auto":
        expected = "auto or a section such as {zero: 2}"
        raise PydanticCustomError("expected", "expected {expected}.{hint}", {"expected": expected, "hint": ""})
    return {}


Parallel: TypeAlias = Annotated[ParallelSection, BeforeValidator(_auto, json_schema_input_type=Auto | ParallelSection)]
