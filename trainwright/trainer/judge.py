"""From what an evaluation gave to predictions, and from predictions to the task's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainwright.data.examples.example import Piece
from trainwright.tasks.task import ExampleTask, GeneratingTask, Report
from trainwright.trainer.outputs import Outputs, by_record

__all__ = ["Examples", "Record", "Writer", "judge", "predictions", "writes"]

Record = Mapping[str, Any]
Writer = Callable[[list[list[int]], GeneratingTask], list[list[int]]]
"""(prompts, task) -> the ids that a model goes on with, for each prompt."""


class Examples(Protocol):
    """What is asked of a dataset made of records (`data.examples.dataset.ExampleDataset`)."""

    def records_of(self, split: str) -> Sequence[Record]: ...

    def examples_of(self, split: str) -> tuple[NDArray[np.int64], Sequence[Piece]]: ...


def writes(task: Any) -> bool:
    """Whether the task's predictions are written token by token."""
    return hasattr(task, "prompt") and hasattr(task, "prediction")


def predictions(
    task: ExampleTask, dataset: Examples, split: str, outputs: Outputs
) -> tuple[list[Record], list[Record]]:
    """Records that were evaluated whole, and what the task predicts for each."""
    record_of_row, pieces = dataset.examples_of(split)
    numbers, grouped = by_record(outputs, record_of_row.tolist(), pieces)
    records = dataset.records_of(split)
    chosen = [records[number] for number in numbers]
    return chosen, task.predict(chosen, grouped)


def written(task: GeneratingTask, records: Sequence[Record], writer: Writer) -> list[Record]:
    """What the model writes for each record."""
    answers = writer([task.prompt(record) for record in records], task)
    return [task.prediction(record, answer) for record, answer in zip(records, answers, strict=True)]


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` numbers, evenly spread, always the same ones; None takes all."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def judge(
    task: Any,
    dataset: Examples,
    split: str,
    outputs: Outputs,
    *,
    writer: Writer | None = None,
    limit: int | None = None,
) -> Report | None:
    """The task's report on a split.

    Args:
        writer: writes the predictions of a task that generates; without one such a task is not judged.
        limit: how many records it writes for.
    """
    if writes(task):
        if writer is None:
            return None
        records = dataset.records_of(split)
        chosen = [records[index] for index in spread(len(records), limit)]
        report: Report = task.report(chosen, written(task, chosen, writer))
        return report
    if not outputs.rows:
        return None
    records, predicted = predictions(task, dataset, split, outputs)
    judged: Report = task.report(records, predicted)
    return judged
