"""Records to examples, in this process or in several; the result does not depend on how many.

An encoder that cannot be pickled, or whose class lives in the caller's script, stays in this process.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.examples.example import Encoded, ExampleEncoder
from trainwright.data.worker_pool import WorkerPool, portable

__all__ = ["Refusal", "encode_all", "encode_batch"]

Record = Mapping[str, Any]
BATCH_RECORDS = 256
TIMED_BATCHES = 2
# Work that is not worth other processes: each imports the task, and torch with it, which takes seconds by itself.
WORTH_SECONDS = 12.0


@dataclass(frozen=True)
class Refusal:
    """What an encoder said of a record that it cannot use."""

    message: str
    hint: str | None


Result = Encoded | Refusal


def encode_batch(encoder: ExampleEncoder, records: Sequence[Record]) -> list[Result]:
    """What each record becomes; the DataError of one record is its result."""
    results: list[Result] = []
    for record in records:
        try:
            results.append(encoder.encode(record))
        except DataError as error:
            results.append(Refusal(error.message, error.hint))
    return results


def encode_all(
    encoder: ExampleEncoder, batches: Iterator[Sequence[Record]], workers: int, records: int
) -> Generator[tuple[Sequence[Record], list[Result]], None, None]:
    """Batches and what their records become, in order.

    The first batches are encoded here and timed; workers are started for the rest where that would take long.

    Args:
        workers: processes at most.
        records: of all batches together.
    """
    began, done = time.perf_counter(), 0
    for batch in itertools.islice(batches, TIMED_BATCHES):
        yield batch, encode_batch(encoder, batch)
        done += len(batch)
    left = (time.perf_counter() - began) * (records - done) / max(done, 1)
    job = partial(encode_batch, encoder)
    if workers == 1 or left <= WORTH_SECONDS or not portable(job):
        for batch in batches:
            yield batch, encode_batch(encoder, batch)
        return
    with WorkerPool(job, workers, "an encoding process") as pool:
        yield from pool.map(batches, list)
