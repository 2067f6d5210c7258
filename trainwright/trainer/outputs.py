"""What an evaluation gave for each row, kept on the host until the task makes predictions of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from trainwright.comm import Ranks
from trainwright.data.examples.example import Piece

__all__ = ["Outputs", "by_record"]

RowOutputs = dict[str, NDArray[Any]]


class Outputs:
    """Arrays by row number. A row that comes again (a batch is filled up with the first one) is not kept again."""

    def __init__(self) -> None:
        self.rows: dict[int, RowOutputs] = {}

    def keep(self, rows: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add the outputs of a batch: tensors whose first dimension is that of rows [B]."""
        host = {name: value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
                for name, value in outputs.items()}  # fmt: skip
        for index, row in enumerate(rows.tolist()):
            if row >= 0:
                self.rows.setdefault(row, {name: value[index] for name, value in host.items()})

    def of_all(self, ranks: Ranks) -> Outputs | None:
        """The rows of all ranks on the first one, None on the others; all ranks call it."""
        parts = ranks.gather_objects(self.rows)
        if parts is None:
            return None
        whole = Outputs()
        for part in parts:
            for row, outputs in part.items():
                whole.rows.setdefault(row, outputs)
        return whole


def by_record(
    outputs: Outputs, record_of_row: Sequence[int], pieces: Sequence[Piece]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The records of which every row has outputs, in order, and their outputs: lists over the record's rows by name,
    with the rows' `Piece`s under "pieces".

    Args:
        record_of_row, pieces: of every row of the split.
    """
    rows_of: dict[int, list[int]] = {}
    for row, record in enumerate(record_of_row):
        rows_of.setdefault(int(record), []).append(row)
    whole = {record: rows for record, rows in rows_of.items() if all(row in outputs.rows for row in rows)}
    grouped = []
    for rows in whole.values():
        rows.sort(key=lambda row: pieces[row].index)
        names = outputs.rows[rows[0]]
        grouped.append(
            {**{name: [outputs.rows[row][name] for row in rows] for name in names}, "pieces": [pieces[r] for r in rows]}
        )
    return list(whole), grouped
