"""What stands on a trunk in place of the language-model head: scores of texts, of tokens, of spans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from trainwright.base.errors import ModelError
from trainwright.models.checks import probability

__all__ = ["HeadSpec", "check_head", "head_fields", "head_from_fields", "head_module_name"]


Kind = Literal["sequence", "token", "span", "entities", "embedding"]
Pooling = Literal["auto", "first", "last", "mean"]
Problem = Literal["single_label", "multi_label", "regression"]


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

    Raises:
        ModelError: a word that is not one of these, labels that are no names or not distinct, or no probability.
    """

    kind: Kind
    labels: tuple[str, ...] = ()
    pooling: Pooling = "auto"
    crf: bool = False
    dropout: float = 0.1
    problem: Problem = "single_label"

    def __post_init__(self) -> None:
        for name, words in (("kind", Kind), ("pooling", Pooling), ("problem", Problem)):
            value = getattr(self, name)
            if value not in get_args(words):
                raise ModelError(f"head: {name} is {value!r}; expected one of {', '.join(get_args(words))}")
        if not isinstance(self.labels, tuple) or not all(isinstance(label, str) for label in self.labels):
            raise ModelError(f"head: labels are {self.labels!r}; expected a tuple of names")
        twice = [label for label in self.labels if self.labels.count(label) > 1]
        if twice:
            raise ModelError(f"head: the label {twice[0]!r} stands there {twice.count(twice[0])} times")
        probability("head: dropout", self.dropout)


def check_head(head: object) -> None:
    """ModelError unless `head` is None or a HeadSpec."""
    if head is not None and not isinstance(head, HeadSpec):
        raise ModelError(f"head={head!r}; expected a HeadSpec, or none")


def head_fields(head: HeadSpec) -> dict[str, Any]:
    """JSON values from which `head_from_fields` makes an equal spec."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(head).items()}


def head_from_fields(values: Mapping[str, Any]) -> HeadSpec:
    """The spec of which `values` are the fields.

    Raises:
        ModelError: fields that a head does not have.
    """
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return HeadSpec(**given)
    except TypeError as error:
        raise ModelError(f"head: {error}") from error


def head_module_name(model_type: str, kind: str) -> str:
    """What the head of a task is called in a model, after the transformers class for the same task."""
    if kind == "embedding":
        return "embedding_head"
    if kind == "span":
        return "qa_outputs"
    encoder = model_type in ("bert", "roberta", "xlm-roberta")
    return "classifier" if encoder or (model_type == "gpt2" and kind == "token") else "score"
