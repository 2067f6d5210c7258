"""Checks that the families' configurations share: one clear error for one bad value."""

from __future__ import annotations

from trainwright.base.errors import ModelError

__all__ = ["check_vocabulary", "positive", "probability"]


def positive(name: str, value: float) -> None:
    """ModelError unless `value` is a number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{name}={value!r}; expected a number above zero")


def probability(name: str, value: float) -> None:
    """ModelError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ModelError(f"{name}={value!r}; expected a probability, 0 <= value < 1")


def check_vocabulary(model_vocab_size: int, tokenizer_vocab_size: int) -> None:
    """ModelError when the tokenizer can produce ids that the model has no embedding for.

    A smaller tokenizer is fine: embeddings are often padded to a multiple of 64 or 128.
    """
    if tokenizer_vocab_size > model_vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer_vocab_size} tokens but the model's vocabulary holds {model_vocab_size}",
            hint=f"use the tokenizer the model was trained with, or set vocab_size to at least {tokenizer_vocab_size}",
        )
