"""All of DeepSpeed's keys in one table, and the way from a DeepSpeed configuration to Trainwright's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.config.deepspeed import numbers, optimizer, parallel, run, scheduler, zero
from trainwright.config.deepspeed.features import FEATURES
from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.numbers import NUMBERS
from trainwright.config.deepspeed.optimizer import OPTIMIZER
from trainwright.config.deepspeed.parallel import PARALLEL
from trainwright.config.deepspeed.run import RUN
from trainwright.config.deepspeed.scheduler import SCHEDULER
from trainwright.config.deepspeed.tables import Block, Entry
from trainwright.config.deepspeed.zero import AIO, ZERO

__all__ = ["DEEPSPEED", "import_deepspeed"]

DEEPSPEED: dict[str, Entry] = {
    **RUN,
    **PARALLEL,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "zero_optimization": Block(ZERO),
    "aio": Block(AIO),
    **NUMBERS,
    **FEATURES,
}
"""Every key that DeepSpeed reads, of 0.19.8 and of the versions before, with what becomes of it; and sizes of expert
parallelism as Megatron-LM's users write them."""


def import_deepspeed(given: Mapping[str, Any], *, name: str, world: int) -> Import:
    """Read a DeepSpeed configuration: what maps stands in `result`, what was said of each key in `notes`.

    Nothing is raised for a key that is wrong, unknown or asks for what is not built: all of that is in `problems`.

    Args:
        name: what messages call the configuration.
        world: ranks that train.
    """
    found = Import(name, world, DEEPSPEED)
    found.read(DEEPSPEED, given)
    run.convert(found)
    parallel.convert(found)
    zero.convert(found)
    numbers.convert(found)
    optimizer.convert(found, scheduler.peak_of(found))
    scheduler.convert(found)
    if not found.problems:
        found.check_answers()
    order = {key: i for i, key in enumerate(given)}
    found.notes.sort(key=lambda note: order.get(note.key.partition(".")[0], len(order)))
    return found
