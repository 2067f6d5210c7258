"""A finished model opened with its task: what `trainwright eval` and `predict` begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from trainwright.base.device import chosen_device
from trainwright.base.errors import ConfigError
from trainwright.comm import ALONE
from trainwright.config import LoadedRecipe, PrecisionSection, load_recipe
from trainwright.config.precision_section import FP32Precision
from trainwright.config.tasks import TaskSection
from trainwright.data import Tokenizer, load_tokenizer
from trainwright.engine import Engine, precision
from trainwright.engine.assemble import hold
from trainwright.models import load_pretrained
from trainwright.trainer.run_folder import RunFolder
from trainwright.trainer.task import define_task, load_task

__all__ = ["Reading", "Trained", "open_trained"]


@dataclass(frozen=True)
class Reading:
    """How records are read: see `data.format`, `data.columns` and the keys beside them."""

    format: str = "auto"
    columns: Mapping[str, str | int] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def of_file(self, format: str | None, columns: Mapping[str, str] | None = None) -> Reading:
        """How another file is read.

        Args:
            format: of it; then its encoding and scheme are its own too, and a column that the training data had and it
                lacks is looked for by its usual names. None reads it as the training data was read.
            columns: its own, in place of those of the training data; it must have them.
        """
        own = {**self.columns, **(columns or {})}
        if format is None:
            return Reading(self.format, own, self.more)
        labels = {key: value for key, value in self.more.items() if key in ("names", "separator")}
        return Reading(format, own, {**labels, "optional": sorted(set(self.columns) - set(columns or ()))})


@dataclass(frozen=True)
class Trained:
    """A finished model with its task.

    Attributes:
        folder: of the model. run: the run folder it lies in, None for a model on its own.
        recipe: of the run. section, sequence_length: of the task.
        survey: what the task knew of its training records. reading: how these were read (format, columns, ...).
    """

    folder: Path
    run: RunFolder | None
    recipe: LoadedRecipe | None
    section: TaskSection
    sequence_length: int
    survey: Mapping[str, Any]
    reading: Reading
    tokenizer: Tokenizer
    engine: Engine

    @property
    def shape(self) -> str | None:
        """Of the task's records; None where it learns from running text."""
        definition = define_task(self.section, self.sequence_length)
        return None if definition is None else definition.shape

    def records_shape(self) -> str:
        """`shape` of a task that predicts something of records.

        Raises:
            ConfigError: it does not (a language model writes: `trainwright generate`).
        """
        if self.shape is None:
            raise ConfigError(
                f"the task {self.section.name} predicts nothing of records",
                hint="`trainwright generate` goes on from a text; `trainwright eval` gives the loss",
            )
        return self.shape

    @property
    def from_records(self) -> bool:
        """Whether the task is made of records."""
        return self.shape is not None


def open_trained(path: str | Path, *, device: str = "auto", numbers: str | None = None) -> Trained:
    """Open a run folder that has finished, or a model folder that a run exported.

    Args:
        device: see `chosen_device`.
        numbers: precision of the forward pass, as recipes name it; None is that of the run, fp32 where a model folder
            does not say it.

    Raises:
        ConfigError: there is no finished model, nothing says what its task is, or the device is not there.
    """
    path = Path(path)
    run = RunFolder(path) if (path / "run.json").is_file() else None
    folder = run.model if run is not None else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no finished model at {path}: {folder / 'config.json'} is missing",
            hint="give the folder of a finished run, or a model folder that a run exported",
        )
    recipe = load_recipe(run.recipe) if run is not None else None
    kept = load_task(folder)
    if kept is None and recipe is None:
        raise ConfigError(
            f"{folder} does not say what its task is", hint="give the run folder, or a model folder of a fine-tuned run"
        )
    if kept is None:
        assert recipe is not None
        kept = {"task": recipe.recipe.task, "survey": {}, "data": {}}
    data = kept["data"]
    section = recipe.recipe.precision if recipe is not None else kept.get("precision", FP32Precision())
    engine = _engine(folder, chosen_device(device), section if numbers is None else _named(numbers))
    length = data.get("sequence_length") or (recipe.recipe.data.sequence_length if recipe is not None else 512)
    return Trained(
        folder=folder,
        run=run,
        recipe=recipe,
        section=kept["task"],
        sequence_length=length,
        survey=kept["survey"],
        reading=Reading(data.get("format", "auto"), data.get("columns", {}), data.get("reading", {})),
        tokenizer=load_tokenizer(folder),
        engine=engine,
    )


def _named(name: str) -> PrecisionSection:
    """The precision of that name, its details left at their defaults."""
    section: PrecisionSection = TypeAdapter(PrecisionSection).validate_python(precision(name).name)
    return section


def _engine(folder: Path, device: torch.device, section: PrecisionSection) -> Engine:
    """An engine without optimizer around the model of a folder, held and computing as a run with this precision did.

    Linear layers of fp8 multiply in bf16: what exchanges them is made for training.
    """
    policy = replace(precision(section.name), scales_loss=False)  # there is no backward pass
    model = load_pretrained(folder, dtype=torch.float32).to(device)
    hold(model, policy, section, replace(ALONE, device=device))
    return Engine(model, None, multiplier=lambda step: 0.0, precision=policy)
