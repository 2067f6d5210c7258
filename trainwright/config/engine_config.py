"""What `trainwright.initialize(config=...)` takes: the parts of a recipe that an engine needs, and the batch sizes."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Tag

from trainwright.base.units import Duration
from trainwright.config.fields import Real, Whole, Words
from trainwright.config.launch_section import CommSection
from trainwright.config.memory_section import MemorySection
from trainwright.config.optim_section import (
    OPTIMIZERS,
    SGD,
    Adafactor,
    AdamW,
    ConstantSchedule,
    Lion,
    Muon,
    ScheduleSection,
    WarmupDecaySchedule,
)
from trainwright.config.parallel_section import Parallel, ParallelSection
from trainwright.config.precision_section import AutoPrecision, PrecisionSection
from trainwright.config.section import Section, variant_of

__all__ = ["BatchSection", "ClientOptim", "EngineConfig"]

WITHIN_THE_RUN = ("linear", "cosine", "wsd", "one_cycle", "polynomial")
"""Schedules whose shape depends on how long the run is."""

NO_SCHEDULE = {"name": "constant", "warmup": 0.0}


class BatchSection(Section):
    """Sizes of a batch; what is missing follows from the rest and the number of ranks."""

    global_: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Rows of one optimizer step, on all ranks together."""
    micro: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Rows of one forward pass on one rank."""
    accumulation: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Forward passes of one optimizer step on one rank."""


class ClientOptim(Section):
    """What drives an optimizer that the caller brings."""

    elsewhere: ClassVar[dict[str, str]] = dict.fromkeys(
        ("weight_decay", "layer_decay", "rules", "betas", "eps", "momentum"),
        "an optimizer that is named here; yours has its own",
    )

    name: Annotated[Literal["client"], Words((*OPTIMIZERS, "client"))] = "client"
    """client: the optimizer comes from the caller."""
    lr: Annotated[float | None, Real((None,), above=0)] = None
    """Peak learning rate of all parameter groups; null leaves each group its own."""
    clip_norm: Annotated[float | None, Real((None,), above=0)] = 1.0
    """Largest norm of the whole gradient; null does not clip."""
    schedule: ScheduleSection = ConstantSchedule(warmup=0.0)
    """Multiplies the learning rate."""


EngineOptim: TypeAlias = Annotated[
    Annotated[AdamW, Tag("<adamw>")]
    | Annotated[SGD, Tag("<sgd>")]
    | Annotated[Adafactor, Tag("<adafactor>")]
    | Annotated[Lion, Tag("<lion>")]
    | Annotated[Muon, Tag("<muon>")]
    | Annotated[ClientOptim, Tag("<client>")],
    Discriminator(
        lambda value: variant_of(value, {**OPTIMIZERS, "client": ClientOptim}, "adamw"),
        custom_error_type="expected",
        custom_error_message="a section such as {name: adamw, lr: 3e-4}",
    ),
]


class EngineConfig(Section):
    """An engine: batch sizes, optimizer, precision, ranks, memory."""

    elsewhere: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("model", "data", "task", "checkpoint", "monitor", "run"), "a recipe, for `trainwright train`"),
        "train": "a recipe, for `trainwright train`; here batch and total_steps say how long and in what batches",
        "launch": "a recipe; here the processes run already",
    }

    batch: BatchSection = BatchSection()
    """Sizes of a batch."""
    optim: EngineOptim | None = None
    """The optimizer, its schedule and clipping; null when the caller brings one, without schedule and clipping."""
    total_steps: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Optimizer steps of the run, for schedules that end with it."""
    seed: Annotated[int, Whole()] = 0
    """Seeds the order of rows and dropout."""
    on_nan: Annotated[Literal["skip", "ignore"], Words(("skip", "ignore"))] = "skip"
    """A step whose gradient is NaN or infinite: leave it out, or take it like any other."""
    precision: PrecisionSection = AutoPrecision()
    """Number formats of weights and matrix products: a name, or a section with the name and its options."""
    parallel: Parallel = ParallelSection()
    """How the state is spread over the ranks; auto leaves all of it open."""
    memory: MemorySection = MemorySection()
    """What is computed again, kept elsewhere or freed early."""
    comm: CommSection = CommSection()
    """How ranks talk to each other."""

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        # A recipe's default schedule ends with the run; an engine does not know how long that is.
        optim = given.get("optim")
        if isinstance(optim, dict) and "schedule" not in optim:
            given["optim"] = {**optim, "schedule": NO_SCHEDULE}
        return given

    def problems(self) -> Any:
        for key in ("tensor", "context", "expert", "pipeline.stages"):
            if attrgetter(key)(self.parallel) == "auto":
                yield f"parallel.{key}", "a number: only a recipe has what auto is chosen by"
        optim = self.optim
        if optim is None:
            return
        if optim.lr == "auto":
            yield "optim.lr", "a number: only a recipe has what auto is chosen by"
        if self.memory.release_gradients and optim.clip_norm is not None:
            yield "memory.release_gradients", "false, or optim.clip_norm null: clipping needs all gradients at once"
        schedule = optim.schedule
        warmup = schedule.warmup
        if isinstance(warmup, Duration) and warmup.unit != "steps":
            yield "optim.schedule.warmup", "a number of steps or a fraction of total_steps"
        if self.total_steps is not None:
            return
        falls = isinstance(schedule, WarmupDecaySchedule) and schedule.decay != "none"
        if schedule.name in WITHIN_THE_RUN or falls:
            yield "total_steps", f"a number of steps: optim.schedule {schedule.name} ends with the run"
        elif warmup == "auto" or (isinstance(warmup, float) and warmup > 0):
            yield "total_steps", "a number of steps, or optim.schedule.warmup as a number of steps (or 0)"
