"""What the sections of all tasks share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from trainwright.config.fields import Real, Words
from trainwright.config.section import Section

__all__ = ["TASK_NAMES", "TaskName", "TaskSection", "TokenTask"]

TaskName = Literal[
    "causal_lm",
    "masked_lm",
    "sft",
    "classification",
    "ner",
    "relation",
    "qa",
    "translation",
    "summarization",
    "dialogue",
    "embedding",
]
TASK_NAMES: tuple[str, ...] = get_args(TaskName)


class TaskSection(Section):
    """How an example becomes a batch and a loss.

    `counted`: what a loss is the mean over, in a word for people.
    """

    elsewhere: ClassVar[dict[str, str]] = {}
    counted: ClassVar[str] = "tokens"

    name: Annotated[TaskName, Words(TASK_NAMES)] = "causal_lm"
    """What is learnt."""
    label_smoothing: Annotated[float, Real(minimum=0, below=1)] = 0.0
    """Share of the target's probability that is spread over all classes (for a language model, the vocabulary)."""


class TokenTask(TaskSection):
    """A task whose targets are tokens."""

    z_loss: Annotated[float, Real(minimum=0)] = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv 2204.02311, uses 1e-4)."""
