"""How the ranks of a run find each other, and agree after every step on what comes next."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from trainwright.comm import Ranks, start, stop
from trainwright.config import Recipe
from trainwright.launch import Heartbeat, heartbeat_from_environment
from trainwright.trainer.cadence import Cadence

if TYPE_CHECKING:
    from trainwright.trainer.run import Run
    from trainwright.trainer.signals import StopRequest

__all__ = ["Due", "agree_on_due", "due_together", "join_ranks"]


@dataclass(frozen=True)
class Due:
    """What all ranks do after this step."""

    evaluate: bool
    save: bool
    stop: bool


def join_ranks(recipe: Recipe, stack: contextlib.ExitStack) -> tuple[Heartbeat | None, Ranks]:
    """Join the other processes of this run; what was started here ends with `stack`.

    The heartbeat is that of a rank among several; a process on its own has none.
    """
    heartbeat = heartbeat_from_environment(hang_after=recipe.comm.hang_after.value)
    if heartbeat is not None:
        stack.enter_context(heartbeat)
    already = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = start(backend=recipe.comm.backend, timeout=timedelta(seconds=recipe.comm.timeout.value))
    if ranks.world > 1 and not already:
        stack.callback(stop)
    return heartbeat, ranks


def agree_on_due(run: Run, stop: StopRequest, moment: dict[str, Any]) -> Due:
    """What is due on any rank is due on all; one small message a step.

    The clock is rank 0's alone: others would evaluate or save at steps of their own. A stop that was asked of one rank
    stops all.
    """
    evaluate = run.evaluation_cadence.due(**moment)
    save = run.save_cadence.due(**moment)
    if run.ranks.world == 1:
        return Due(evaluate, save, stop.requested is not None)
    first = run.ranks.is_first
    votes = torch.tensor([first and evaluate, first and save, stop.requested is not None], dtype=torch.int32)
    evaluate, save, stopping = (bool(vote) for vote in run.ranks.sum_(votes).tolist())
    return Due(evaluate, save, stopping)


def due_together(ranks: Ranks, cadence: Cadence, moment: dict[str, Any]) -> bool:
    """Whether something is due that all ranks do together, by rank 0's clock.

    Steps and tokens are the same on all ranks, and need no message.
    """
    due = cadence.due(**moment)
    return bool(ranks.broadcast_json(due)) if cadence.by_clock else due
