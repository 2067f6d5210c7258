"""From what an evaluation gave to predictions, and from predictions to the task's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainwright.comm import Ranks
from trainwright.data.examples.example import Piece
from trainwright.tasks.task import ExampleTask, GeneratingTask, Record, Report
from trainwright.trainer.outputs import Outputs, by_record
from trainwright.trainer.together import first_decides

__all__ = ["Examples", "Judgement", "Writer", "judge", "predictions", "spread", "writes", "written"]

Writer = Callable[[list[list[int]], GeneratingTask], list[list[int]]]
"""(prompts, task) -> the ids that a model goes on with, for each prompt."""


class Examples(Protocol):
    """What is asked of a dataset made of records (`data.examples.dataset.ExampleDataset`)."""

    def records_of(self, split: str) -> Sequence[Record]: ...

    def examples_of(self, split: str) -> tuple[NDArray[np.int64], Sequence[Piece]]: ...


def writes(task: Any) -> bool:
    """Whether the task's predictions are written token by token."""
    return hasattr(task, "prompt") and hasattr(task, "prediction")


@dataclass(frozen=True)
class Judgement:
    """The task's numbers, the same on every rank, and the report that they are part of, on the first."""

    metrics: Mapping[str, float]
    report: Report | None


def predictions(task: ExampleTask, dataset: Examples, split: str, outputs: Outputs) -> dict[int, Record]:
    """What the task predicts, by the number of the record, for those that were evaluated whole."""
    record_of_row, pieces = dataset.examples_of(split)
    numbers, grouped = by_record(outputs, record_of_row.tolist(), pieces)
    records = dataset.records_of(split)
    found = task.predict([records[number] for number in numbers], grouped)
    return dict(zip(numbers, found, strict=True))


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
    ranks: Ranks,
    *,
    writer: Writer | None = None,
    limit: int | None = None,
) -> Judgement | None:
    """Judge the task on a split; a collective of all ranks. None where there is nothing to judge by.

    Records of a task that writes count where they say what is expected; the others are passed over.

    Args:
        writer: writes the predictions of a task that generates; without one such a task is not judged. All ranks write
            the same, in step: parameters may be divided among them.
        limit: how many records it writes for.
    """
    if not writes(task):
        whole = outputs.of_all(ranks)
        if not first_decides(ranks, lambda: whole is not None and bool(whole.rows)):
            return None
        return _judgement(ranks, lambda: _report(task, dataset, split, whole or Outputs()))
    if writer is None or limit == 0:
        return None
    records = dataset.records_of(split)
    chosen = [record for index in spread(len(records), limit) if task.answered(record := records[index])]
    if not chosen:
        return None
    answers = written(task, chosen, writer)
    return _judgement(ranks, lambda: task.report(chosen, answers))


def _report(task: ExampleTask, dataset: Examples, split: str, outputs: Outputs) -> Report:
    found = predictions(task, dataset, split, outputs)
    records = dataset.records_of(split)
    return task.report([records[number] for number in found], list(found.values()))


def _judgement(ranks: Ranks, make: Callable[[], Report]) -> Judgement:
    reports: list[Report] = []

    def metrics() -> dict[str, float]:
        reports.append(make())
        return {name: float(value) for name, value in reports[0].metrics.items()}

    numbers = first_decides(ranks, metrics)
    return Judgement(numbers, reports[0] if reports else None)
