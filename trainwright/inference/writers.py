"""Which models write texts."""

from __future__ import annotations

from typing import Any, TypeAlias

from trainwright.base.errors import ModelError
from trainwright.models import Decoder
from trainwright.models.hugging_face.model import HuggingFaceModel

__all__ = ["Writer", "as_writer"]

Writer: TypeAlias = Decoder | HuggingFaceModel
"""A native decoder, or a decoder or encoder-decoder of transformers."""


def as_writer(model: Any) -> Writer:
    """The model itself, where it writes.

    Raises:
        ModelError: it is an encoder, or a task's head stands in place of its language-model head.
    """
    kind = model.config.kind if isinstance(model, HuggingFaceModel) else ""
    if not isinstance(model, Decoder) and kind not in ("causal_lm", "seq2seq"):
        raise ModelError(
            f"{type(model).__name__} does not write texts",
            hint="use a decoder, or an encoder-decoder such as t5 or bart",
        )
    if model.config.head is not None:
        raise ModelError(
            f"{type(model).__name__} has the head of a task ({model.config.head.kind}) and gives scores, not words",
            hint="`trainwright predict` uses it",
        )
    return model
