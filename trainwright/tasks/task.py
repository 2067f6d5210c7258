"""What a task is: how records become examples, what is trained on them, and how good the result is.

A task is made in two steps, because labels are only known once the training data has been seen:

    definition = define_task(section)                    # from the recipe
    survey = definition.survey(records)                  # one pass over the training records; plain JSON
    task = definition.bind(survey, tokenizer)            # trains, evaluates, predicts

`survey` is kept with the built examples and with the finished model, so that the same task is bound again later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec

__all__ = [
    "LISTED_ERRORS",
    "PREDICT_INSTEAD",
    "Batch",
    "ExampleTask",
    "GeneratingTask",
    "LossOutput",
    "Metric",
    "Record",
    "Report",
    "Table",
    "Task",
    "TaskDefinition",
]

Batch = Mapping[str, Tensor]
"""Tensors whose first dimension is the rows."""
Record = Mapping[str, Any]
"""Fields of one record by name: see `data.records.record.SHAPES`; "where" says where it stands."""
LISTED_ERRORS = 2000
"""Errors that a report lists at most."""
PREDICT_INSTEAD = "check data.columns; `trainwright predict` needs no answers"
"""What to do with records that say nowhere what is right."""


@dataclass(frozen=True)
class LossOutput:
    """What a task says of one micro-batch. Only the engine divides, once per optimizer step.

    Attributes:
        loss_sum: scalar float32, the objective summed over what is trained (tokens, texts, words).
        count: scalar integer, how many of these there are in this micro-batch.
        outputs: in evaluation, what predictions are made of: tensors whose first dimension is the rows of the batch.
    """

    loss_sum: Tensor
    count: Tensor
    outputs: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Metric:
    """The number by which a task's models are compared.

    Attributes:
        name: key of `Report.metrics`; "loss" is the validation loss, which every task has.
        higher: whether more is better.
    """

    name: str = "loss"
    higher: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of numbers for people: a title, names of columns, rows of cells (text, int or float), and notes below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """How good predictions are.

    Attributes:
        metrics: numbers by name, fractions in [0, 1] where the field writes fractions (F1, accuracy), else as the
            field writes them (BLEU, ROUGE: 0 to 100).
        tables: the same in more detail.
        labels, confusion: names, and counts [true, predicted], where the task has classes.
        errors: what was predicted wrongly: {"text": ..., "expected": ..., "predicted": ..., ...} each.
    """

    metrics: Mapping[str, float]
    tables: tuple[Table, ...] = ()
    labels: tuple[str, ...] = ()
    confusion: Sequence[Sequence[int]] | None = None
    errors: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


class Task(Protocol):
    """How a batch becomes a loss: `loss` is what is trained, `evaluate` is what is compared between runs.

    `best`: what early stopping and the best checkpoint go by.
    `head`: what stands on the model's trunk in place of its language-model head; None keeps that.
    """

    @property
    def name(self) -> str: ...

    @property
    def best(self) -> Metric: ...

    @property
    def head(self) -> HeadSpec | None: ...

    def loss(self, model: Any, batch: Batch) -> LossOutput: ...

    def evaluate(self, model: Any, batch: Batch) -> LossOutput: ...


class ExampleTask(Task, Protocol):
    """A task whose rows are made of records.

    `outputs` below are what `evaluate` returned, as numpy arrays, one entry for each example of the records; `pieces`
    are those examples' `Piece`s (a long text may be several examples).
    """

    encoder: ExampleEncoder

    def predict(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """One prediction for each record, in the task's own format; outputs are grouped by record:
        outputs[i]["name"] is the list of what the examples of record i gave, outputs[i]["pieces"] their `Piece`s."""
        ...

    def report(self, records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """Compare predictions with what the records say. Records without the answer cannot be reported on."""
        ...


class GeneratingTask(ExampleTask, Protocol):
    """A task whose predictions are written token by token: `evaluate` gives a loss, and the text comes from a
    generator that the trainer or a command holds."""

    def answered(self, record: Mapping[str, Any]) -> bool:
        """Whether the record says what is expected, so that what is written can be judged by it."""
        ...

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """Token ids that the model goes on from (decoder), or reads (encoder of an encoder-decoder)."""
        ...

    def prediction(self, record: Mapping[str, Any], tokens: Sequence[int]) -> Mapping[str, Any]:
        """The prediction that these generated ids make, end-of-turn token included where it was written."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    @property
    def max_new_tokens(self) -> int: ...


class TaskDefinition(Protocol):
    """A task as the recipe says it, before the data was seen.

    `shape`: of its records, a name of `data.records.SHAPES`.
    """

    name: str
    shape: str

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What the task must know of the training records (the names of the labels, ...), as JSON values."""
        ...

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> ExampleTask: ...
