"""What stands on a trunk in place of the language-model head: scores of texts, of tokens, of spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["HeadSpec"]


@dataclass(frozen=True)
class HeadSpec:
    """A head as plain data.

    Attributes:
        kind: "sequence": scores [B, labels] of a text; "token": scores [B, T, labels]; "span": start and end scores
            [B, T, 2]; "entities": scores [B, labels] of the two marked entities, from their vectors; "embedding": a
            vector [B, D] of a text.
        labels: names of the scores, in order.
        pooling: which vectors of a text are read. "auto": the first token's of an encoder, the last real token's of a
            decoder.
        crf: a "token" head scores transitions between labels too (linear-chain conditional random field).
        dropout: in front of the head.
        problem: "single_label", "multi_label" or "regression": for config.json, as transformers has it.
    """

    kind: Literal["sequence", "token", "span", "entities", "embedding"]
    labels: tuple[str, ...] = ()
    pooling: Literal["auto", "first", "last", "mean"] = "auto"
    crf: bool = False
    dropout: float = 0.1
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
