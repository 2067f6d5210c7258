"""Batches from a client's dataset: every rank its own rows, in an order that depends on seed and epoch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from trainwright.base.errors import ConfigError
from trainwright.base.protocols import StateDict

__all__ = ["EngineLoader"]


class EngineLoader:
    """One pass over the dataset per iteration, in micro-batches; each pass is shuffled anew.

    The last rows that do not fill a micro-batch on every rank are left out, so that all ranks take the same number of
    steps. `state_dict` remembers the pass and the place in it: a resumed run goes on with the rows that come next.

    Args:
        dataset: with `__len__` and `__getitem__`.
        micro_batch: rows of one micro-batch on one rank.
        rows: (place, count) of this rank among those that see different rows (`Mesh.rows`).
        collate_fn: joins rows to a batch; None is torch's own.

    Raises:
        ConfigError: the dataset has no length, or fewer rows than one micro-batch on every rank needs.
    """

    def __init__(
        self,
        dataset: Any,
        micro_batch: int,
        rows: tuple[int, int],
        *,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"training_data is a {type(dataset).__name__} without a length",
                hint="pass a dataset with __len__ and __getitem__, or iterate over your own loader",
            )
        place, places = rows
        if len(dataset) < micro_batch * places:
            raise ConfigError(
                f"training_data has {len(dataset)} rows, and {places} ranks need {micro_batch} each for a step",
                hint="use a smaller micro-batch or fewer processes",
            )
        self.dataset: Dataset[Any] = dataset
        self.micro_batch = micro_batch
        self.epoch = 0
        self.batches_taken = 0
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=places, rank=place, shuffle=True, seed=seed, drop_last=True
        )
        self._loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=micro_batch, sampler=self._sampler, drop_last=True, collate_fn=collate_fn
        )

    def __len__(self) -> int:
        """Micro-batches of one pass on this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(self.epoch)
        skip = self.batches_taken
        for index, batch in enumerate(self._loader):
            if index < skip:
                continue
            self.batches_taken = index + 1
            yield batch
        self.epoch += 1
        self.batches_taken = 0

    def state_dict(self) -> StateDict:
        """The pass and the micro-batches taken of it."""
        return {"epoch": self.epoch, "batches_taken": self.batches_taken}

    def load_state_dict(self, state: StateDict) -> None:
        """The next iteration goes on behind the micro-batches that were taken."""
        self.epoch, self.batches_taken = int(state["epoch"]), int(state["batches_taken"])
