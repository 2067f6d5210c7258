"""Batches for training and evaluation: which rows a step sees is computed, never remembered.

Draw k of a run is row `order(k)`, a pure function of (dataset, seed, k). Step s takes draws [s * B, (s + 1) * B),
rank r of W the r-th of W equal parts of them. So every world size that divides B sees the same rows in the same step,
a resume needs one number (rows consumed), and there is no shuffle buffer to lose. The last batch of an epoch runs over
into the next one.

What differs from epoch to epoch (which tokens are masked, say) is a `transform` of a batch and its draw numbers: as
pure as the rows are.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.faults import fault_point
from trainwright.data.length_order import LengthOrder
from trainwright.data.mixture import RowGroup, RowOrder
from trainwright.data.prefetch import Prefetcher

if TYPE_CHECKING:
    import torch

__all__ = ["Arrays", "Batch", "Loader", "Rows", "Transform", "evaluation_batches", "evaluation_rows"]

Batch = dict[str, "torch.Tensor"]
Arrays = dict[str, NDArray[Any]]
Transform = Callable[[Arrays, NDArray[np.int64]], Arrays]
"""(arrays of a batch, global number of the draw of each row) -> arrays. Pure; in evaluation the draw is the row."""

STATE_SCHEMA = 1


class Rows(Protocol):
    """What is asked of a dataset: `TokenDataset` and `ExampleDataset` have it."""

    fingerprint: str
    folder: Path

    def rows(self, split: str = "train") -> int: ...

    def groups(self, split: str = "train") -> tuple[RowGroup, ...]: ...

    def lengths(self, split: str) -> NDArray[np.int64]: ...

    def batch(self, split: str, rows: NDArray[np.integer]) -> Arrays: ...

    def blank(self, batch: Arrays, first: int) -> None: ...


class Loader:
    """Endless batches of a split. Iterate for prefetched batches, or ask for any step with `batch(step)`.

    Args:
        batch_rows: rows of a global batch (over all ranks, before gradient accumulation divides it).
        seed: chooses the order of rows.
        prefetch: batches assembled ahead, by one thread; 0 assembles each when it is asked for.
        transform: changes batches on their way; see `Transform`.
        group_by_length: rows of similar length stand in the same batch, which leaves less padding.

    Raises:
        ConfigError: `batch_rows` is not divisible by `world`.

    Attributes:
        waited: seconds that the consumer spent waiting for batches, in total. Read differences.
        rows_consumed: global rows handed out so far; the whole state.
    """

    def __init__(
        self,
        dataset: Rows,
        batch_rows: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        split: str = "train",
        prefetch: int = 4,
        pin_memory: bool = False,
        transform: Transform | None = None,
        group_by_length: bool = False,
    ) -> None:
        if batch_rows < 1 or world < 1 or not 0 <= rank < world:
            raise ConfigError(f"no batch of {batch_rows} rows for rank {rank} of {world}")
        if batch_rows % world:
            lower = batch_rows // world * world
            near = f"{lower} or {lower + world}" if lower else str(world)
            raise ConfigError(
                f"a batch of {batch_rows} rows cannot be divided among {world} processes", hint=f"use {near} rows"
            )
        self.dataset = dataset
        self.batch_rows = batch_rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.split = split
        self.waited = 0.0
        self.rows_consumed = 0
        self.group_by_length = group_by_length
        order = self._order(batch_rows)
        self._source = _Source(dataset, split, order, batch_rows, rank, world, pin_memory, transform)
        self._prefetch = prefetch
        self._ahead: Prefetcher | None = None

    def _order(self, group: int) -> RowOrder | LengthOrder:
        order = RowOrder(self.dataset.groups(self.split), self.seed)
        return LengthOrder(order, self.dataset.lengths(self.split), group) if self.group_by_length else order

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch of the split (of all sources of a mixture together)."""
        return self._source.order.rows

    @property
    def epoch(self) -> float:
        """Epochs consumed so far; with a weighted mixture, in rows of all sources together."""
        return self.rows_consumed / self.rows_per_epoch

    @property
    def weights(self) -> dict[str, float]:
        """The share of rows that each source of the mixture really gets."""
        return self._source.order.weights

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers that this rank sees in a step."""
        return self._source.rows(step * self.batch_rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 at the start of the run: pure, from any thread, moves no state."""
        return self._source.batch(step * self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; raises what assembling it raised (DataError for a damaged block)."""
        fault_point("data.next", step=self.rows_consumed // self.batch_rows, rank=self.rank)
        began = time.perf_counter()
        if self._prefetch < 1:
            batch = self._source.batch(self.rows_consumed)
        else:
            if self._ahead is None:
                self._ahead = Prefetcher(self._source.batch, self.rows_consumed, self.batch_rows, self._prefetch)
                weakref.finalize(self, self._ahead.stop)
            try:
                batch = self._ahead.take()
            except BaseException:
                self.close()
                raise
        self.waited += time.perf_counter() - began
        self.rows_consumed += self.batch_rows
        return batch

    def close(self) -> None:
        """Stop the prefetch thread. Iterating again starts a new one where this one's consumer stood."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """A few numbers, the same on every rank and for every world size."""
        state = {
            "schema": STATE_SCHEMA,
            "seed": self.seed,
            "split": self.split,
            "rows_consumed": self.rows_consumed,
            "fingerprint": self.dataset.fingerprint,
        }
        if isinstance(self._source.order, LengthOrder):
            state["group_rows"] = self._source.order.batch_rows
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the rows that were consumed. Raises DataError when the rows would not be the same ones."""
        if state.get("schema") != STATE_SCHEMA:
            raise DataError(f"the loader's state has schema {state.get('schema')!r}; this version reads {STATE_SCHEMA}")
        if state["fingerprint"] != self.dataset.fingerprint:
            raise DataError(
                f"the dataset changed: the run was trained on {state['fingerprint']}, but {self.dataset.folder} is "
                f"{self.dataset.fingerprint}",
                hint="resume with the text, tokenizer and row settings the run began with, or start a new run",
            )
        for name in ("seed", "split"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the run drew its rows with {name} {state[name]!r}, now it is {getattr(self, name)!r}",
                    hint=f"set the {name} back to {state[name]!r}, or start a new run",
                )
        if ("group_rows" in state) != self.group_by_length:
            raise DataError(
                f"the run drew its rows {'with' if 'group_rows' in state else 'without'} grouping them by length",
                hint="set it back to what it was, or start a new run",
            )
        self.close()
        if self.group_by_length:  # a batch of another size goes on in the order that was begun
            self._source.order = self._order(int(state["group_rows"]))
        self.rows_consumed = int(state["rows_consumed"])


class _Source:
    """What the prefetch thread needs: shared with the Loader, which it must not keep alive."""

    def __init__(
        self,
        dataset: Rows,
        split: str,
        order: RowOrder | LengthOrder,
        batch_rows: int,
        rank: int,
        world: int,
        pin_memory: bool,
        transform: Transform | None,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.order = order
        self.batch_rows = batch_rows
        self.share = batch_rows // world
        self.first = rank * self.share
        self.pin_memory = pin_memory
        self.transform = transform

    def draws(self, draw: int) -> NDArray[np.int64]:
        begin = draw + self.first
        return np.arange(begin, begin + self.share, dtype=np.int64)

    def rows(self, draw: int) -> NDArray[np.int64]:
        return self.order(self.draws(draw))

    def batch(self, draw: int) -> Batch:
        arrays = self.dataset.batch(self.split, self.rows(draw))
        if self.transform is not None:
            arrays = self.transform(arrays, self.draws(draw))
        batch = _tensors(arrays)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch


def evaluation_rows(dataset: Rows, split: str = "validation", limit_rows: int | None = None) -> NDArray[np.int64]:
    """The rows that an evaluation covers: all, or `limit_rows` spread evenly over the split, always the same ones."""
    count = dataset.rows(split)
    if limit_rows is None or limit_rows >= count:
        return np.arange(count, dtype=np.int64)
    return np.arange(limit_rows, dtype=np.int64) * count // limit_rows


def evaluation_batches(
    dataset: Rows,
    batch_rows: int,
    split: str = "validation",
    *,
    rank: int = 0,
    world: int = 1,
    limit_rows: int | None = None,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Every evaluation row exactly once over all ranks, in batches of `batch_rows` / `world` rows.

    The last batch is filled up with rows whose labels are all -100 (NaN for numbers), so that shapes stay static and
    every rank gets the same number of batches: sums of losses and counts of labels come out exact. A `transform` gets
    row numbers as draws: it does the same to a row in every evaluation.
    """
    if batch_rows % world:
        raise ConfigError(f"a batch of {batch_rows} rows cannot be divided among {world} processes")
    rows = evaluation_rows(dataset, split, limit_rows)
    share = batch_rows // world
    for begin in range(0, len(rows), batch_rows):
        mine = rows[begin + rank * share : min(begin + (rank + 1) * share, len(rows))]
        missing = share - len(mine)
        filled = np.concatenate([mine, np.repeat(rows[:1], missing)])
        batch = dataset.batch(split, filled)
        if transform is not None:
            batch = transform(batch, filled)
        if missing:
            dataset.blank(batch, len(mine))
        yield _tensors(batch)


def _tensors(arrays: Arrays) -> Batch:
    import torch  # here, not above: building a dataset needs no torch, and it takes seconds to import

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
