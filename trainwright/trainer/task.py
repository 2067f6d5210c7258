"""From the recipe's `task` section to a task: the border where its name becomes a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.comm import Ranks
from trainwright.config import Recipe
from trainwright.config.precision_section import PRECISIONS
from trainwright.config.tasks import TASKS, CausalLMSection, MaskedLMSection, TaskSection
from trainwright.data import TokenDataset, Tokenizer
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.spec import example_spec
from trainwright.tasks import CausalLM, Task
from trainwright.tasks.masked_lm import MaskedLM
from trainwright.tasks.registry import DEFINITIONS
from trainwright.tasks.task import TaskDefinition
from trainwright.trainer.run_folder import write_json

__all__ = ["TASK_FILE", "Dataset", "define_task", "load_task", "make_task", "save_task"]

TASK_FILE = "trainwright_task.json"
"""In a run folder and beside a finished model: what it takes to bind the task again."""

Dataset = TokenDataset | ExampleDataset


def define_task(section: TaskSection, sequence_length: int) -> TaskDefinition | None:
    """The definition of a task that is made of records; None for one that learns from running text.

    Args:
        sequence_length: tokens of the longest example.
    """
    if isinstance(section, CausalLMSection | MaskedLMSection):
        return None
    if section.name not in DEFINITIONS:
        raise ConfigError(f"task {section.name} has no definition", hint=f"known: {', '.join(DEFINITIONS)}")
    return DEFINITIONS[section.name](section, sequence_length)


def make_task(recipe: Recipe, dataset: Dataset, tokenizer: Tokenizer, *, group: Any = None) -> Task:
    """The task of a settled recipe, bound to what its data says.

    Args:
        group: the processes that train on other rows of the same step; a task that compares rows asks them for theirs.
    """
    section, compiled = recipe.task, recipe.train.compile is True
    if isinstance(section, CausalLMSection):
        return CausalLM(label_smoothing=section.label_smoothing, z_loss=section.z_loss, compiled=compiled)
    if isinstance(section, MaskedLMSection):
        return MaskedLM(section, tokenizer, seed=recipe.train.seed, compiled=compiled)
    definition = define_task(section, recipe.data.sequence_length)
    assert definition is not None
    assert isinstance(dataset, ExampleDataset), "tasks made of records have examples"
    task = definition.bind(dataset.survey, tokenizer)
    for name, value in (("compiled", compiled), ("group", group)):  # tasks that can use one have it as an attribute
        if hasattr(task, name):
            setattr(task, name, value)
    return task


def save_task(recipe: Recipe, dataset: Dataset, folder: Path, ranks: Ranks) -> None:
    """Write down in a folder what the task of its model is; the first rank does."""
    if ranks.is_first and isinstance(dataset, ExampleDataset):
        kept = {
            "task": recipe.task.to_dict(),
            "survey": dataset.survey,
            "precision": recipe.precision.to_dict(),
            "data": {
                "sequence_length": recipe.data.sequence_length,
                "format": recipe.data.format,
                "columns": dict(recipe.data.columns),
                "reading": dict(example_spec(recipe.data).reading),
            },
        }
        write_json(folder / TASK_FILE, kept)


def load_task(folder: Path) -> dict[str, Any] | None:
    """What `save_task` wrote, the sections of task and precision read back; None where it wrote nothing."""
    path = folder / TASK_FILE
    if not path.is_file():
        return None
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name = kept["task"]["name"]
    if name not in TASKS:
        raise ConfigError(f"{path}: no task is called {name!r}", hint=f"known: {', '.join(TASKS)}")
    sections: dict[str, Any] = {"task": TASKS[name](**kept["task"])}
    if "precision" in kept:  # older folders do not say it
        sections["precision"] = PRECISIONS[kept["precision"]["name"]](**kept["precision"])
    return {**kept, **sections}
