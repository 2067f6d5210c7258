"""`checkpoint`, `monitor` and `run`: what is kept, what is shown, and what the run is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, JsonValue, Tag

from trainwright.base.units import Duration
from trainwright.config.fields import Auto, Listed, Name, Real, Truth, Unit, Whole, Words
from trainwright.config.section import Section

__all__ = ["CheckpointSection", "KeepBestSection", "MonitorSection", "RunSection", "SampleSection"]


class KeepBestSection(Section):
    """Keep the checkpoint of the best evaluation."""

    metric: Annotated[str, Name(what_it_is="auto, loss, or the name of one of the task's metrics")] = "auto"
    """What is compared: auto is what early stopping goes by, else the task's own metric, else the validation loss."""


def _keep_best(value: Any) -> str:
    return "<section>" if isinstance(value, (Mapping, KeepBestSection)) else "<word>"


KeepBest: TypeAlias = Annotated[
    Annotated[bool | Auto, Truth(("auto",)), Tag("<word>")] | Annotated[KeepBestSection, Tag("<section>")],
    Discriminator(_keep_best),
]


class CheckpointSection(Section):
    """Resumable state on disk."""

    every: Annotated[Duration | Literal["never"], Unit(("never",))] = Duration(600, "seconds")
    """How often a checkpoint is saved; an interrupted run saves one in any case."""
    keep: Annotated[int, Whole(minimum=1)] = 3
    """Checkpoints that stay; older ones are deleted, the last good one never."""
    keep_best: KeepBest = "auto"
    """Keep the checkpoint of the best evaluation beside the newest ones, whenever it was; {metric: ...} says what is
    best. auto does where the task has a metric of its own or training may stop early."""
    asynchronous: Annotated[bool, Truth()] = True
    """Write in the background while training goes on."""
    save_final: Annotated[bool, Truth()] = True
    """Save a checkpoint at the end of the run."""


class MonitorSection(Section):
    """What is shown and recorded."""

    console: Annotated[Literal["auto", "rich", "plain", "quiet"], Words(("auto", "rich", "plain", "quiet"))] = "auto"
    """Live progress, plain lines, or nothing; auto is rich on a terminal and plain elsewhere."""
    log_every: Annotated[Duration, Unit()] = Duration(10, "steps")
    """How often a step is recorded and shown."""
    tensorboard: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """Write TensorBoard events; auto when tensorboard is installed."""


class SampleSection(Section):
    """Text that the model writes during and after training."""

    prompts: Annotated[tuple[str, ...], Listed((), Name())]
    """Texts that the model continues."""
    every: Annotated[Duration | Literal["never"], Unit(("never",))] = "never"
    """How often during training; a sample is written at the end in any case."""
    max_new_tokens: Annotated[int, Whole(minimum=1)] = 128
    """Longest continuation."""
    temperature: Annotated[float, Real(minimum=0)] = 0.8
    """0 takes the most likely token every time; higher is more varied."""
    top_k: Annotated[int | None, Whole((None,), minimum=1)] = None
    """Choose among the k most likely tokens; null does not limit."""
    top_p: Annotated[float, Real(above=0, maximum=1)] = 1.0
    """Choose among the most likely tokens that together have this probability; 1 does not limit."""
    seed: Annotated[int, Whole()] = 0
    """Seed of the choices."""

    def without_effect(self) -> dict[str, str]:
        if self.temperature == 0:
            return dict.fromkeys(("top_k", "top_p", "seed"), "run.sample.temperature is 0")
        return {}


class RunSection(Section):
    """Name, place and small print of a run."""

    dir: Annotated[str, Name(what_it_is="a folder")] = "runs"
    """Folder of all runs."""
    name: Annotated[str | None, Name((None,), what_it_is="a name without / or \\", pattern=r"(?!\.)[^/\\\x00]+")] = None
    """Name of the run's folder; null is the name of the recipe's file. A second run of a name gets -2."""
    description: Annotated[str | None, Name((None,))] = None
    """What this recipe is for; shown by `runs show`."""
    sample: SampleSection | None = None
    """Text that the model writes during and after training; null writes none."""
    smoke: dict[str, JsonValue] = Field(default_factory=dict)
    """Dotted keys and values that shrink this recipe to seconds, for the project's tests."""

    def problems(self) -> Any:
        if any(key.startswith("run.smoke") for key in self.smoke):
            yield "smoke", "keys of other sections"
