"""What a build of examples is asked for: one frozen value, from Python or from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trainwright.base.errors import ConfigError
from trainwright.data.documents import OnError, SourceSpec
from trainwright.data.spec import TrainTokenizer, ValidationSpec, build_spec, list_sources

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["AUTO_FRACTION", "ExampleSpec", "Packing", "example_spec"]

Packing = Literal["pad", "best_fit"]

AUTO_FRACTION = 0.05  # of the training records, where `validation: auto` holds some out


@dataclass(frozen=True)
class ExampleSpec:
    """Everything that decides the bytes of a dataset of examples, beside the task itself.

    Args:
        train: sources of the training records.
        weighted: draw the sources in proportion to their `weight`; False takes every record once per epoch.
        validation: a fraction of the training records by the hash of their keys, other sources, or None.
            `ValidationSpec()` is a fraction of AUTO_FRACTION; at least one record is held out and one is kept.
        fold: (index, number of folds): hold out this one of equally large parts of the training records instead.
        test: sources of the test split.
        tokenizer: how to train one, where to load one (a path or a hub name), or a Tokenizer.
        sequence_length: tokens of the longest row.
        packing: "pad" gives every example a row; "best_fit" fills training rows with whole examples. The rows of
            validation and test are examples always, so that predictions can be put together.
        format: of the files; "auto" looks at them.
        columns: expected name to the name that the files have.
        reading: further arguments of `data.records.read_records`: encoding, separator, names, scheme.
        max_drop: largest share of a split's records that may give no example.
        max_cut: largest share of a split's records that may be cut because they are too long; how is the task's to say.
        pad_multiple: batches are padded to the longest of their rows, rounded up to this.
        static: pad every batch to `sequence_length` (compilation, pipelines and context parallelism want one shape).
        task: the task's options as text. Datasets of equal text open without a look at the records; "" always looks.
    """

    train: tuple[SourceSpec, ...]
    validation: ValidationSpec | None = field(default_factory=ValidationSpec)
    fold: tuple[int, int] | None = None
    test: tuple[SourceSpec, ...] = ()
    tokenizer: TrainTokenizer | Tokenizer | str = field(default_factory=TrainTokenizer)
    sequence_length: int = 512
    packing: Packing = "pad"
    format: str = "auto"
    columns: Mapping[str, str | int] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    on_error: OnError = "stop"
    max_drop: float = 0.05
    max_cut: float = 1.0
    pad_multiple: int = 8
    static: bool = False
    weighted: bool = False
    task: str = ""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("a dataset needs at least one source of training records")
        if self.packing not in ("pad", "best_fit"):
            raise ConfigError(f"packing is {self.packing!r}; expected 'pad' or 'best_fit' for examples")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}; expected at least 2")
        for name, share in (("max_drop", self.max_drop), ("max_cut", self.max_cut)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is {share}; expected a share from 0 to 1")
        if self.pad_multiple < 1:
            raise ConfigError(f"pad_multiple is {self.pad_multiple}; expected at least 1")
        labels = [source.label for source in self.train]
        if self.weighted and len(set(labels)) < len(labels):
            raise ConfigError(
                f"two sources of the mixture have the same name: {', '.join(labels)}", hint="give each its own `name`"
            )

    @property
    def fraction(self) -> float:
        """Share of the training records that is held out; 0 for none."""
        if self.fold is not None:
            return 1 / self.fold[1]
        if self.validation is None or self.validation.sources:
            return 0.0
        return AUTO_FRACTION if self.validation.fraction is None else self.validation.fraction


def example_spec(
    data: Any, task: Any = None, *, model_tokenizer: str | None = None, static: bool = False
) -> ExampleSpec:
    """The ExampleSpec of a recipe's `data` section (and `task` section, which decides what can be reused).

    `packing: concat`, which is for running text, means one example a row here.
    """
    text = build_spec(data, model_tokenizer=model_tokenizer)
    return ExampleSpec(
        train=text.sources,
        validation=text.validation,
        fold=None if data.fold is None else (data.fold.index, data.fold.of),
        test=list_sources(data.test, data.text_field) if data.test else (),
        tokenizer=text.tokenizer,
        sequence_length=data.sequence_length,
        packing="best_fit" if data.packing == "best_fit" else "pad",
        format=data.format,
        columns=dict(data.columns),
        reading={"encoding": data.encoding, "separator": data.separator, "names": data.names, "scheme": data.scheme},
        on_error=data.on_error,
        max_drop=data.max_drop,
        max_cut=data.max_cut,
        static=static,
        weighted=text.weighted,
        task="" if task is None else json.dumps(task.to_dict(), sort_keys=True, default=str),
    )
