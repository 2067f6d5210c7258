"""Tasks whose targets are labels of texts, tokens, pairs of entities, or spans."""

from __future__ import annotations

from typing import Annotated, Literal

from trainwright.config.fields import Words
from trainwright.config.tasks.base import TaskSection

__all__ = ["ClassificationSection", "NERSection", "QASection", "RelationSection"]


class ClassificationSection(TaskSection):
    """One label, several labels, or a number for a text or a pair of texts."""

    problem: Annotated[
        Literal["auto", "single_label", "multi_label", "regression"],
        Words(("auto", "single_label", "multi_label", "regression")),
    ] = "auto"
    """What a label is; auto reads it off the training data."""


class NERSection(TaskSection):
    """A tag for every word."""


class RelationSection(TaskSection):
    """The relation between two marked entities."""


class QASection(TaskSection):
    """The span of a text that answers a question."""
