"""`comm` and `launch`: how ranks talk to each other, and how many there are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from trainwright.base.units import Duration
from trainwright.config.fields import Auto, Unit, Whole, Words
from trainwright.config.section import Section

__all__ = ["CommSection", "LaunchSection"]


class CommSection(Section):
    """How ranks talk to each other."""

    backend: Annotated[Literal["auto", "gloo", "nccl"], Words(("auto", "gloo", "nccl"))] = "auto"
    """Library of the collectives; auto is nccl on CUDA devices and gloo on the CPU."""
    wire: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Words(("auto", "fp32", "bf16", "fp16"))] = "auto"
    """Format in which gradients travel; they are summed in fp32 in any case. auto follows precision."""
    timeout: Annotated[Duration, Unit(only="seconds")] = Duration(1800, "seconds")
    """A collective that takes longer fails."""
    hang_after: Annotated[Duration, Unit(only="seconds")] = Duration(600, "seconds")
    """A rank that makes no progress for this long is named, with its stack."""

    def problems(self) -> Any:
        if self.hang_after.value > self.timeout.value:
            yield "hang_after", f"at most comm.timeout, which is {self.timeout}"


class LaunchSection(Section):
    """How many processes train."""

    processes: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Processes on this machine; auto is one for each accelerator, and one without."""
