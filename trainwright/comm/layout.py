"""The layout of a run's processes as one frozen value with one set of rules: what is divided over whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.config.pipeline_section import SCHEDULES, V_SCHEDULES

__all__ = ["SCHEDULES", "V_SCHEDULES", "Layout", "PipelineLayout"]


@dataclass(frozen=True)
class PipelineLayout:
    """How the blocks are divided over ranks one after another.

    Attributes:
        stages: ranks along the pipeline.
        schedule: one of `SCHEDULES`.
        virtual: parts of the model on each rank; more than 1 for the interleaved and V-shaped schedules.
        cuts: the first block of every part but the first, ascending; None balances them by cost.
    """

    stages: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    cuts: tuple[int, ...] | None = None

    @property
    def parts(self) -> int:
        """Parts that the model is cut into."""
        return self.stages * self.virtual

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with it by itself."""
        if self.stages < 1:
            yield f"parallel.pipeline.stages is {self.stages}, expected at least 1"
            return
        if self.schedule not in SCHEDULES:
            yield f"parallel.pipeline.schedule is {self.schedule}, expected one of {', '.join(SCHEDULES)}"
        if self.virtual < 1:
            yield f"parallel.pipeline.virtual is {self.virtual}, expected at least 1"
        if self.stages == 1:
            return
        if self.schedule in V_SCHEDULES and self.virtual != 2:
            yield f"{self.schedule} places two parts on each rank, but parallel.pipeline.virtual is {self.virtual}"
        if self.schedule.startswith("interleaved") and self.virtual < 2:
            yield f"{self.schedule} needs several parts on each rank, but parallel.pipeline.virtual is {self.virtual}"
        if self.schedule in ("gpipe", "1f1b") and self.virtual != 1:
            yield f"{self.schedule} places one part on each rank, but parallel.pipeline.virtual is {self.virtual}"
        if self.cuts is not None and len(self.cuts) != self.parts - 1:
            seen = f"parallel.pipeline.cuts has {len(self.cuts)} entries"
            yield f"{seen}, expected {self.parts - 1} for {self.parts} parts"


@dataclass(frozen=True)
class Layout:
    """How a model, its state and its data are divided over the ranks of a run.

    Ranks are numbered `[pipeline, data, tensor]`, tensor innermost. Inside data, neighbours share a copy of the ZeRO
    state (`shard`), pieces of the same rows (`context`) and the experts of a layer (`expert`).

    Attributes:
        world: all ranks.
        zero: 0 replicates everything; 1 shards optimizer state; 2 gradients too; 3 parameters too (arXiv 1910.02054).
        shard: ranks that hold one copy of the state together; `data / shard` equal replicas of it. 1 at stage 0.
        accumulate: "local" adds up the gradients of all micro-batches before they travel (a whole gradient in memory);
            "sharded" sends those of every micro-batch, and holds only this rank's part.
        gather: "step" keeps gathered parameters from the first forward pass of a step to its last backward pass;
            "micro_batch" gives them up after each block's forward and backward pass.
        tensor: ranks over which every block's matrices are divided (arXiv 1909.08053).
        context: ranks over which every sequence is divided.
        ulysses: of these, ranks that exchange attention heads (arXiv 2309.14509); the others form a ring
            (arXiv 2310.01889).
        expert: ranks over which the experts of a layer are divided.
        pipeline: how the blocks are divided.
    """

    world: int
    zero: int
    shard: int
    accumulate: str = "local"
    gather: str = "step"
    tensor: int = 1
    context: int = 1
    ulysses: int = 1
    expert: int = 1
    pipeline: PipelineLayout = field(default_factory=PipelineLayout)

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(
                f"this layout cannot run on {self.world} processes: " + "; ".join(problems), hint=self._nearest()
            )

    @classmethod
    def draft(cls, world: int, zero: int, shard: int, **others: Any) -> Layout:
        """A layout whose rules have not been checked: to ask what is wrong with it, not to run with."""
        layout = object.__new__(cls)
        pipeline = others.pop("pipeline", PipelineLayout())
        for name, value in {"world": world, "zero": zero, "shard": shard, "pipeline": pipeline, **others}.items():
            object.__setattr__(layout, name, value)
        return layout

    def problems(self) -> list[str]:
        """Every rule that does not hold; empty for a layout that was made in the ordinary way."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        degrees = {"tensor": self.tensor, "context": self.context, "expert": self.expert, "ulysses": self.ulysses}
        small = [f"parallel.{name} is {value}, expected at least 1" for name, value in degrees.items() if value < 1]
        yield from small
        yield from self.pipeline.problems()
        if small or self.pipeline.stages < 1:
            return
        each = self.tensor * self.pipeline.stages
        if self.world % each:
            yield (
                f"parallel.tensor {self.tensor} x parallel.pipeline.stages {self.pipeline.stages} does not divide "
                f"the {self.world} processes"
            )
            return
        yield from self._state_problems()
        if self.data % self.context:
            yield f"parallel.context {self.context} does not divide the {self.data} data-parallel ranks"
        if self.context % self.ulysses:
            yield f"parallel.ulysses {self.ulysses} does not divide parallel.context {self.context}"
        if self.data % self.expert:
            yield f"parallel.expert {self.expert} does not divide the {self.data} data-parallel ranks"
        elif self.is_sharded and self.shard % self.expert:
            yield f"parallel.expert {self.expert} does not divide parallel.shard {self.shard}"

    def _state_problems(self) -> Iterator[str]:
        if self.zero not in (0, 1, 2, 3):
            yield f"parallel.zero is {self.zero}, expected 0, 1, 2 or 3"
        if self.shard < 1 or self.data % self.shard:
            ranks = "processes" if self.data == self.world else "data-parallel ranks"
            yield f"parallel.shard {self.shard} does not divide the {self.data} {ranks}"
        if self.zero == 0 and self.shard != 1:
            yield f"parallel.shard is {self.shard}, but stage 0 shards nothing"
        if self.zero in (0, 1) and self.accumulate == "sharded":
            yield f"parallel.accumulate is sharded, but stage {self.zero} holds whole gradients"
        if self.zero != 3 and self.gather == "micro_batch":
            yield f"parallel.gather is micro_batch, but stage {self.zero} holds whole parameters"

    def _nearest(self) -> str:
        each = max(1, self.tensor) * max(1, self.pipeline.stages)
        if self.world % each:
            degrees = ", ".join(str(d) for d in divisors(self.world))
            return f"tensor x stages can be {degrees} here, or start a multiple of {each} processes"
        shards = ", ".join(str(d) for d in divisors(self.world // each))
        return f"parallel.shard can be {shards} here; shards belong to stages 1 to 3"

    @property
    def data(self) -> int:
        """Ranks that hold the same part of the model: those over which gradients are summed and state is sharded."""
        return self.world // (self.tensor * self.pipeline.stages)

    @property
    def rows(self) -> int:
        """Ranks, of those, that see different rows of the batch."""
        return self.data // self.context

    @property
    def replicas(self) -> int:
        """How many equal copies of the state there are."""
        return self.data // self.shard

    @property
    def is_sharded(self) -> bool:
        """Whether any state is divided at all: one process, or shards of one rank, divide nothing."""
        return self.zero > 0 and self.shard > 1

    @property
    def divides_model(self) -> bool:
        """Whether ranks hold different parts of the model, beyond what ZeRO divides."""
        return max(self.tensor, self.expert, self.pipeline.stages) > 1

    def with_state(self, zero: int, shard: int, accumulate: str = "local", gather: str = "step") -> Layout:
        """The same division of the model under another ZeRO stage."""
        return replace(self, zero=zero, shard=shard, accumulate=accumulate, gather=gather)

    def describe(self) -> str:
        """The layout in words, for the plan and the log."""
        if self.world == 1:
            return "one process: nothing is divided"
        axes = self._describe_axes()
        if self.data == 1:
            return axes
        return f"{axes}; {self._describe_state()}" if axes else self._describe_state()

    def _describe_axes(self) -> str:
        parts = []
        if self.pipeline.stages > 1:
            several = f" of {self.pipeline.virtual} parts" if self.pipeline.virtual > 1 else ""
            parts.append(f"pipeline of {self.pipeline.stages} stages{several} ({self.pipeline.schedule})")
        if self.tensor > 1:
            parts.append(f"matrices over {self.tensor} ranks")
        if self.context > 1:
            ring = self.context // self.ulysses
            how = " x ".join(
                text
                for text in (f"ring of {ring}" * (ring > 1), f"heads over {self.ulysses}" * (self.ulysses > 1))
                if text
            )
            parts.append(f"sequences over {self.context} ranks ({how})")
        if self.expert > 1:
            parts.append(f"experts over {self.expert} ranks")
        return "; ".join(parts)

    def _describe_state(self) -> str:
        if not self.is_sharded:
            return f"{self.data} replicas; gradients are summed over all (2 Psi a step)"
        what = {
            1: "optimizer state",
            2: "optimizer state and gradients",
            3: "optimizer state, gradients and parameters",
        }
        text = f"ZeRO-{self.zero}: {what[self.zero]} divided over {self.shard} ranks"
        if self.replicas > 1:
            text += f", {self.replicas} replicas of that"
        kept = {
            "local": "gradients add up on every rank and travel once a step",
            "sharded": "gradients travel with every micro-batch",
        }
        gathered = {
            "step": "parameters are gathered once a step",
            "micro_batch": "parameters are gathered twice for every micro-batch",
        }
        return f"{text}; {kept[self.accumulate]}; {gathered[self.gather]}"

    def wire_psi(self, micro_batches: int) -> float:
        """Elements that a rank sends per step to share state, in units of Psi (N - 1) / N for the Psi parameters of its
        part of the model; replicas not counted."""
        if not self.is_sharded:
            return 2.0 if self.data > 1 else 0.0
        gathers = 1 if self.gather == "step" else 2 * micro_batches
        return gathers + (1 if self.accumulate == "local" else micro_batches)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
