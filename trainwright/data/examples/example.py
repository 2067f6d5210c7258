"""One training example as arrays, and what makes examples of records. Plain values: they cross processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from trainwright.data.dataset import IGNORE

__all__ = ["IGNORE", "Encoded", "Example", "ExampleEncoder", "Feature", "Piece"]


@dataclass(frozen=True)
class Feature:
    """How one named array of every example is stored, and how examples of different length make a batch.

    Attributes:
        axis: "tokens": one entry for each of the example's input tokens, padded at the end; "target": a length of its
            own (decoder tokens, words), padded at the end; "row": the same `shape` in every example.
        pad: what fills up. Integer labels are padded with IGNORE, floating-point ones with NaN: neither is trained.
    """

    name: str
    dtype: Literal["int32", "int64", "float32"]
    axis: Literal["tokens", "target", "row"]
    pad: float = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Which part of its record an example is: `index` of `count`, with whatever the task needs to put answers back
    together (`facts`: JSON values)."""

    index: int = 0
    count: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """Arrays by feature name; "input_ids" and "labels" are always among them.

    Labels of language models are shifted already: labels[t] is what comes after input_ids[t].
    """

    arrays: Mapping[str, NDArray[Any]]
    piece: Piece = Piece()

    @property
    def length(self) -> int:
        return len(self.arrays["input_ids"])


@dataclass(frozen=True)
class Encoded:
    """What one record became.

    Attributes:
        examples: usually one.
        cut_tokens: tokens that did not fit and were left out.
        dropped: why the record gave no example; None when it gave some.
    """

    examples: tuple[Example, ...] = ()
    cut_tokens: int = 0
    dropped: str | None = None


class ExampleEncoder(Protocol):
    """What a task makes of records.

    Attributes:
        features: of every example.
        max_length: input tokens of the longest example.
        fingerprint: text that changes whenever the same record would give other arrays (the tokenizer is not part).
        packable: whether several examples may stand in one row, apart by `document_ids`.

    It may have `must_train_ids`, token ids of which at least one must be trained in the training split.
    """

    @property
    def features(self) -> tuple[Feature, ...]: ...

    @property
    def max_length(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def packable(self) -> bool: ...

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Raises DataError where the record cannot be used: what was seen, what was expected."""
        ...
