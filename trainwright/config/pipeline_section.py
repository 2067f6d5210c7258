"""`parallel.pipeline`: consecutive blocks of the model on consecutive ranks, and the order in which they work."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator

from trainwright.config.fields import Auto, Listed, Whole, Words
from trainwright.config.section import Section

__all__ = ["SCHEDULES", "V_SCHEDULES", "Pipeline", "PipelineSection", "parts_per_rank"]

ScheduleName: TypeAlias = Literal["gpipe", "1f1b", "interleaved", "interleaved_zb", "zbv", "dualpipev"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
"""Orders of work in a pipeline: GPipe (arXiv 1811.06965), 1F1B and interleaved (arXiv 2104.04473), zero-bubble
(arXiv 2401.10241), DualPipe-V (DeepSeek-V3, arXiv 2412.19437)."""

V_SCHEDULES = ("zbv", "dualpipev")
"""Those that place the first and the last part on one rank, and always two parts on each."""

INTERLEAVED = ("interleaved", "interleaved_zb")
INTERLEAVED_PARTS = 2  # the least that is interleaved: each part more sends as much again


def parts_per_rank(schedule: str, virtual: int | Auto) -> int:
    """Parts of the model on each rank of the pipeline: what `virtual` says, or what the schedule's shape asks for."""
    if schedule in V_SCHEDULES:
        return 2
    if schedule not in INTERLEAVED:
        return 1
    return INTERLEAVED_PARTS if virtual == "auto" else virtual


class PipelineSection(Section):
    """How the blocks of the model are divided over ranks that work on different micro-batches at the same time."""

    stages: Annotated[int | Auto, Whole(("auto",), minimum=1)] = 1
    """Ranks that the blocks are divided over; auto is 1 unless the model then does not fit."""
    schedule: Annotated[ScheduleName, Words(SCHEDULES)] = "1f1b"
    """Order of the passes: interleaved, interleaved_zb, zbv, dualpipev have several parts on a rank and idle less."""
    virtual: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Parts of the model on each rank, for interleaved and interleaved_zb; auto is 2."""
    cuts: Annotated[tuple[int, ...] | Auto, Listed(("auto",), Whole(minimum=1))] = "auto"
    """Number of the first block of every part but the first, in order; auto balances the cost of the parts."""
    micro_batches: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Micro-batches of one run of the schedule; auto takes all those of a step."""

    @property
    def parts(self) -> int | None:
        """Parts of the model on all ranks together; None while the number of stages is open."""
        return None if self.stages == "auto" else self.stages * parts_per_rank(self.schedule, self.virtual)

    def without_effect(self) -> dict[str, str]:
        if self.stages == 1:
            return dict.fromkeys(
                ("schedule", "virtual", "cuts", "micro_batches"), "parallel.pipeline.stages is 1: nothing is cut"
            )
        if self.schedule in INTERLEAVED:
            return {}
        parts = parts_per_rank(self.schedule, "auto")
        return {"virtual": f"schedule {self.schedule} has {parts} part{'s' if parts > 1 else ''} on each rank"}

    def problems(self) -> Any:
        if self.schedule in INTERLEAVED and self.virtual == 1:
            yield "virtual", "at least 2: with one part on each rank, interleaved is 1f1b"
        if self.cuts == "auto":
            return
        if list(self.cuts) != sorted(set(self.cuts)):
            yield "cuts", "numbers of blocks in rising order, each once"
        if self.parts is None:
            yield "cuts", "auto, or parallel.pipeline.stages as a number: cuts belong to a number of stages"
        elif len(self.cuts) != self.parts - 1:
            per_rank = parts_per_rank(self.schedule, self.virtual)
            yield "cuts", f"{self.parts - 1} numbers: {self.stages} stages with {per_rank} part(s) each"


def _stages(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
        return {"stages": value}
    return value


Pipeline: TypeAlias = Annotated[
    PipelineSection, BeforeValidator(_stages, json_schema_input_type=int | Auto | PipelineSection)
]
