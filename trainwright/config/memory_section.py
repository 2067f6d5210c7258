"""`memory`: what is computed again, kept elsewhere or freed early, so that more fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Tag

from trainwright.config.fields import Auto, Name, Truth, Whole, Words
from trainwright.config.section import Section, variant_tag

__all__ = ["MemorySection", "Recompute", "RecomputeEvery"]

RECOMPUTE = ("auto", "none", "full", "selective")


class RecomputeEvery(Section):
    """Recompute every n-th block."""

    every: Annotated[int, Whole(minimum=1)]
    """The activations of every n-th block are computed again in backward."""


def _recompute(value: Any) -> str | None:
    if isinstance(value, str):
        return "<word>"
    if isinstance(value, Mapping):
        return variant_tag("every")
    return "<every>" if isinstance(value, RecomputeEvery) else None


Recompute: TypeAlias = Annotated[
    Annotated[Literal["auto", "none", "full", "selective"], Words(RECOMPUTE), Tag("<word>")]
    | Annotated[RecomputeEvery, Tag("<every>")],
    Discriminator(
        _recompute,
        custom_error_type="expected",
        custom_error_message="one of auto, none, full, selective or {every: n}",
    ),
]


class MemorySection(Section):
    """What is computed again, kept elsewhere or freed early."""

    recompute: Recompute = "auto"
    """Activations computed again in backward: none, full (each block), selective (cheap operations), {every: n}."""
    mlp_chunks: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Pieces of the sequence that go through each MLP one after another; 1 is all at once, auto as memory needs."""
    offload_activations: Annotated[bool, Truth()] = False
    """Keep the activations that backward needs in host memory."""
    optimizer_state: Annotated[Literal["device", "host", "nvme"], Words(("device", "host", "nvme"))] = "device"
    """Where the optimizer's state lives and is updated; nvme: in files, mapped and prefetched."""
    nvme_path: Annotated[str | None, Name((None,), what_it_is="a folder")] = None
    """Folder of the files of memory.optimizer_state: nvme."""
    parameters: Annotated[Literal["device", "host"], Words(("device", "host"))] = "device"
    """Where parameters live between uses; host: copied to the device block by block."""
    release_gradients: Annotated[bool, Truth()] = False
    """Update each parameter in backward and free its gradient at once; excludes optim.clip_norm."""

    def without_effect(self) -> dict[str, str]:
        if self.optimizer_state != "nvme":
            return {"nvme_path": f"memory.optimizer_state is {self.optimizer_state}"}
        return {}

    def problems(self) -> Any:
        if self.optimizer_state == "nvme" and self.nvme_path is None:
            yield "nvme_path", "a folder: memory.optimizer_state is nvme"
