"""`task`: what is learnt. A word, or a section with the name and the keys of that task."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Discriminator, Tag

from trainwright.config.section import by_name, variant_of
from trainwright.config.tasks.base import TASK_NAMES, TaskName, TaskSection
from trainwright.config.tasks.generative import (
    DialogueSection,
    EmbeddingSection,
    SFTSection,
    SummarizationSection,
    TranslationSection,
)
from trainwright.config.tasks.labelled import ClassificationSection, NERSection, QASection, RelationSection
from trainwright.config.tasks.text import CausalLMSection, MaskedLMSection

__all__ = [
    "TASKS",
    "TASK_NAMES",
    "CausalLMSection",
    "ClassificationSection",
    "DialogueSection",
    "EmbeddingSection",
    "MaskedLMSection",
    "NERSection",
    "QASection",
    "RelationSection",
    "SFTSection",
    "SummarizationSection",
    "Task",
    "TaskName",
    "TaskSection",
    "TranslationSection",
]

TASKS: dict[str, type[TaskSection]] = {
    "causal_lm": CausalLMSection,
    "masked_lm": MaskedLMSection,
    "sft": SFTSection,
    "classification": ClassificationSection,
    "ner": NERSection,
    "relation": RelationSection,
    "qa": QASection,
    "translation": TranslationSection,
    "summarization": SummarizationSection,
    "dialogue": DialogueSection,
    "embedding": EmbeddingSection,
}


def _variant(value: Any) -> str | None:
    return variant_of(value, TASKS, "causal_lm")


_Tasks: TypeAlias = Annotated[
    Annotated[CausalLMSection, Tag("<causal_lm>")]
    | Annotated[MaskedLMSection, Tag("<masked_lm>")]
    | Annotated[SFTSection, Tag("<sft>")]
    | Annotated[ClassificationSection, Tag("<classification>")]
    | Annotated[NERSection, Tag("<ner>")]
    | Annotated[RelationSection, Tag("<relation>")]
    | Annotated[QASection, Tag("<qa>")]
    | Annotated[TranslationSection, Tag("<translation>")]
    | Annotated[SummarizationSection, Tag("<summarization>")]
    | Annotated[DialogueSection, Tag("<dialogue>")]
    | Annotated[EmbeddingSection, Tag("<embedding>")],
    Discriminator(_variant),
]

Task: TypeAlias = Annotated[_Tasks, BeforeValidator(by_name, json_schema_input_type=str | _Tasks)]
