"""What the name of a metric says."""

from __future__ import annotations

import re

__all__ = ["less_is_better"]

_LESS_IS_BETTER = ("loss", "perplexity", "error", "errors", "mse", "mae", "rmse", "wer", "cer", "ter")


def less_is_better(name: str) -> bool:
    """Whether a metric of this name counts what is wrong: losses and errors, also as a part (`head_loss`)."""
    return bool(set(re.split(r"[^a-z]+", name.lower())) & set(_LESS_IS_BETTER))
