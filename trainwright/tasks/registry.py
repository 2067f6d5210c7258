"""The one table from names of tasks to what defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainwright.tasks.classification import ClassificationDefinition
from trainwright.tasks.embedding import EmbeddingDefinition
from trainwright.tasks.generation import DialogueDefinition, PairDefinition
from trainwright.tasks.ner import NERDefinition
from trainwright.tasks.qa import QADefinition
from trainwright.tasks.relation import RelationDefinition
from trainwright.tasks.sft import SFTDefinition
from trainwright.tasks.task import TaskDefinition

__all__ = ["DEFINITIONS"]

DEFINITIONS: dict[str, Callable[[Any, int], TaskDefinition]] = {
    "classification": ClassificationDefinition,
    "ner": NERDefinition,
    "qa": QADefinition,
    "relation": RelationDefinition,
    "sft": SFTDefinition,
    "translation": PairDefinition,
    "summarization": PairDefinition,
    "dialogue": DialogueDefinition,
    "embedding": EmbeddingDefinition,
}
"""Name to (section of the recipe, longest example in tokens) -> definition, for every task that is made of records."""
