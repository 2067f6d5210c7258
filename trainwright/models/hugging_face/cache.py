"""transformers' own key/value cache behind the few things that generation asks of a cache."""

from __future__ import annotations

from torch import Tensor

from trainwright.models.hugging_face.library import empty_cache

__all__ = ["HuggingFaceCache"]


class HuggingFaceCache:
    """Grows with every forward pass that is given it.

    length: tokens seen so far. inner: what the model itself is given.
    """

    def __init__(self) -> None:
        self.inner = empty_cache()
        self.length = 0

    def advance(self, count: int) -> None:
        """Note that a forward pass has appended so many tokens."""
        self.length += count

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows (an index tensor), each as often as it is named."""
        self.inner.reorder_cache(rows)
