"""From rows of an evaluation to predictions of records, on one rank and on two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainwright.comm import ALONE
from trainwright.comm.runtime import start
from trainwright.data.examples.example import Piece
from trainwright.tasks.task import Report
from trainwright.testing import run_ranks
from trainwright.trainer.judge import judge, predictions, spread
from trainwright.trainer.outputs import Outputs

RECORD_OF_ROW = np.asarray([0, 1, 1, 2])
PIECES = [Piece(), Piece(1, 2), Piece(0, 2), Piece()]  # the pieces of record 1 stand the other way round


class Data:
    def records_of(self, split: str) -> Sequence[Mapping[str, Any]]:
        return [{"text": name, "label": name} for name in "abc"]

    def examples_of(self, split: str) -> tuple[np.ndarray, Sequence[Piece]]:
        return RECORD_OF_ROW, PIECES


class Joins:
    """Predicts the numbers of a record's pieces, in order."""

    def predict(self, records: Sequence[Any], outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [
            {"parts": [int(value) for value in of["value"]], "order": [p.index for p in of["pieces"]]} for of in outputs
        ]

    def report(self, records: Sequence[Any], predicted: Sequence[Mapping[str, Any]]) -> Report:
        return Report({"records": float(len(records)), "sum": float(sum(sum(p["parts"]) for p in predicted))})


def kept(rows: list[int]) -> Outputs:
    outputs = Outputs()
    outputs.keep(torch.tensor(rows), {"value": torch.tensor([10 + row for row in rows])})
    return outputs


def test_pieces_of_a_record_come_together_in_their_order() -> None:
    found = predictions(Joins(), Data(), "test", kept([3, 2, 1]))  # type: ignore[arg-type]
    assert found == {1: {"parts": [12, 11], "order": [0, 1]}, 2: {"parts": [13], "order": [0]}}


def test_a_record_without_all_its_rows_is_left_out() -> None:
    assert list(predictions(Joins(), Data(), "test", kept([0, 1]))) == [0]  # type: ignore[arg-type]


def test_a_row_that_fills_up_a_batch_is_not_kept() -> None:
    outputs = kept([0])
    outputs.keep(torch.tensor([0, -1]), {"value": torch.tensor([99, 99])})
    assert {row: int(kept["value"]) for row, kept in outputs.rows.items()} == {0: 10}


def test_limits_are_spread_and_always_the_same() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, None) == spread(3, 8) == [0, 1, 2]


def on_ranks(rank: int, world: int) -> list[Any]:
    ranks = start(device="cpu")
    rows = [[0, 3], [1, 2]][rank]
    judged = judge(Joins(), Data(), "test", kept(rows), ranks)
    assert judged is not None
    return [dict(judged.metrics), judged.report is not None]


def test_ranks_judge_together() -> None:
    alone = judge(Joins(), Data(), "test", kept([0, 1, 2, 3]), ALONE)
    assert alone is not None
    assert alone.metrics == {"records": 3.0, "sum": 46.0}
    assert run_ranks(on_ranks, 2) == [[dict(alone.metrics), True], [dict(alone.metrics), False]]


class Writes:
    """Answers with the length of its prompt; records without "answer" have nothing to be compared with."""

    def answered(self, record: Mapping[str, Any]) -> bool:
        return "answer" in record

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        return [1] * record["asked"]

    def prediction(self, record: Mapping[str, Any], tokens: Sequence[int]) -> Mapping[str, Any]:
        return {"text": len(tokens)}

    def report(self, records: Sequence[Any], predicted: Sequence[Mapping[str, Any]]) -> Report:
        right = [record["answer"] == one["text"] for record, one in zip(records, predicted, strict=True)]
        return Report({"right": sum(right) / len(right), "records": float(len(right))})


class Questions(Data):
    def __init__(self, *records: Mapping[str, Any]) -> None:
        self.records = records

    def records_of(self, split: str) -> Sequence[Mapping[str, Any]]:
        return self.records


def echo(prompts: list[list[int]], task: Any) -> list[list[int]]:
    return prompts


def test_what_says_nothing_of_the_answer_is_passed_over() -> None:
    """A chat that ends with the user, or running text among chats, is trained on but cannot be judged."""
    data = Questions({"asked": 1, "answer": 1}, {"asked": 2}, {"text": "running"}, {"asked": 3, "answer": 4})
    found = judge(Writes(), data, "validation", Outputs(), ALONE, writer=echo)
    assert found is not None
    assert found.metrics == {"right": 0.5, "records": 2.0}
    assert judge(Writes(), Questions({"asked": 2}), "validation", Outputs(), ALONE, writer=echo) is None


def test_nothing_evaluated_is_nothing_to_judge() -> None:
    assert judge(Joins(), Data(), "test", Outputs(), ALONE) is None
