"""`parallel`: how the state of training and the model itself are spread over the ranks.

ZeRO, arXiv 1910.02054; tensor parallelism, arXiv 1909.08053, with sequence parallelism, arXiv 2205.05198; Ulysses,
arXiv 2309.14509; ring attention, arXiv 2310.01889.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from trainwright.base.errors import ConfigError
from trainwright.config.fields import Auto, Truth, Whole, Words
from trainwright.config.pipeline_section import Pipeline, PipelineSection
from trainwright.config.section import Section

__all__ = ["Parallel", "ParallelSection"]

Stage: TypeAlias = Literal["auto", 0, 1, 2, 3]


class ParallelSection(Section):
    """How the state of training, the model, the sequence and the experts are spread over the ranks."""

    elsewhere: ClassVar[dict[str, str]] = {
        name: f"Megatron-LM or DeepSpeed; here it is {ours}"
        for name, ours in (
            ("tensor_model_parallel_size", "parallel.tensor"),
            ("tp_size", "parallel.tensor"),
            ("autotp_size", "parallel.tensor"),
            ("sequence_parallel", "part of parallel.tensor"),
            ("pipeline_model_parallel_size", "parallel.pipeline.stages"),
            ("virtual_pipeline_model_parallel_size", "parallel.pipeline.virtual"),
            ("context_parallel_size", "parallel.context"),
            ("sequence_parallel_size", "parallel.context with parallel.ulysses as large"),
            ("expert_model_parallel_size", "parallel.expert"),
            ("expert_parallel", "parallel.expert"),
            ("ep_size", "parallel.expert"),
        )
    }

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
    tensor: Annotated[int | Auto, Whole(("auto",), minimum=1)] = 1
    """Ranks that each matrix product is divided over; auto is 1 unless the model then does not fit."""
    async_tensor: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """Overlap the products with what tensor ranks send each other; auto where the device can."""
    context: Annotated[int | Auto, Whole(("auto",), minimum=1)] = 1
    """Ranks that each sequence is divided over; auto is 1 unless its activations then do not fit."""
    ulysses: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Context ranks that exchange heads for positions (Ulysses); groups of them form a ring. 1 is ring attention."""
    expert: Annotated[int | Auto, Whole(("auto",), minimum=1)] = 1
    """Ranks that the experts of a mixture-of-experts model are divided over; auto is 1 unless they do not fit."""
    pipeline: Pipeline = PipelineSection()
    """Consecutive blocks on consecutive ranks: a number of stages, or a section."""

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same rows together: tensor x context x stages; degrees that are open count as 1."""
        degrees = (self.tensor, self.context, self.pipeline.stages)
        return math.prod(1 if degree == "auto" else degree for degree in degrees)

    def row_ranks(self, world: int) -> int:
        """Of `world` ranks, how many have rows of their own: the factor of ranks in the sizes of a batch.

        Raises:
            ConfigError: `world` is not a multiple of tensor x context x stages.
        """
        rows, rest = divmod(world, self.model_ranks)
        if rest or not rows:
            needed = f"tensor {self.tensor} x context {self.context} x pipeline.stages {self.pipeline.stages}"
            near = sorted({self.model_ranks * max(1, rows), self.model_ranks * (rows + 1)})
            raise ConfigError(
                f"parallel: {needed} needs a multiple of {self.model_ranks} processes, and there are {world}",
                hint=f"start {' or '.join(map(str, near))} processes, or use smaller degrees",
            )
        return rows

    def without_effect(self) -> dict[str, str]:
        return {**self._idle_model(), **self._idle_state()}

    def problems(self) -> Any:
        if isinstance(self.ulysses, int) and isinstance(self.context, int) and self.context % self.ulysses:
            yield "ulysses", f"a divisor of parallel.context, which is {self.context}"

    def _idle_model(self) -> dict[str, str]:
        idle = {}
        if self.tensor == 1:
            idle["async_tensor"] = "parallel.tensor is 1: no product is divided"
        if self.context == 1:
            idle["ulysses"] = "parallel.context is 1: no sequence is divided"
        return idle

    def _idle_state(self) -> dict[str, str]:
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
