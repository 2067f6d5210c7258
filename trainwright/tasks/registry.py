"""The one table from names of tasks to what defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainwright.tasks.classification import ClassificationDefinition
from trainwright.tasks.sft import SFTDefinition
from trainwright.tasks.task import TaskDefinition

__all__ = ["DEFINITIONS"]

DEFINITIONS: dict[str, Callable[[Any, int], TaskDefinition]] = {
    "classification": ClassificationDefinition,
    "sft": SFTDefinition,
}
"""Name to (section of the recipe, longest example in tokens) -> definition, for every task that is made of records."""
