"""Tasks whose targets are texts: instructions, translation, summaries, dialogue; and embeddings of texts."""

from __future__ import annotations

from trainwright.config.tasks.base import TaskSection, TokenTask

__all__ = ["DialogueSection", "EmbeddingSection", "SFTSection", "SummarizationSection", "TranslationSection"]


class SFTSection(TokenTask):
    """Answer as the assistant of a chat does."""


class TranslationSection(TokenTask):
    """Write a text in another language."""


class SummarizationSection(TokenTask):
    """Write a shorter text."""


class DialogueSection(TokenTask):
    """Write the next turn."""


class EmbeddingSection(TaskSection):
    """Vectors that are near for texts that belong together."""
