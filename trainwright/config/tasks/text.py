"""Tasks that learn from running text: causal and masked language modelling."""

from __future__ import annotations

from typing import Annotated, Literal

from trainwright.config.fields import Real, Truth, Words
from trainwright.config.tasks.base import TaskSection, TokenTask

__all__ = ["CausalLMSection", "MaskedLMSection"]


class CausalLMSection(TokenTask):
    """Predict the next token."""


class MaskedLMSection(TaskSection):
    """Predict tokens that were hidden (BERT, arXiv 1810.04805)."""

    masking: Annotated[Literal["token", "word", "span"], Words(("token", "word", "span"))] = "token"
    """What is chosen together: single tokens, whole words, or spans of words (SpanBERT, arXiv 1907.10529)."""
    mask_share: Annotated[float, Real(above=0, below=1)] = 0.15
    """Share of the tokens that are predicted; 80 % of them are hidden, 10 % replaced at random, 10 % left."""
    frame: Annotated[bool, Truth()] = True
    """Every stretch of text begins with [CLS] and ends with [SEP], as the texts of later tasks do."""
