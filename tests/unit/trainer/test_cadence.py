"""When something is due, in every unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from trainwright.base.units import Duration
from trainwright.comm import Ranks
from trainwright.trainer.cadence import Cadence
from trainwright.trainer.ranks import due_together


def due_steps(every: Duration | None, *, tokens_per_step: int, steps: int, tokens_per_epoch: int = 0) -> list[int]:
    cadence = Cadence(every, tokens_per_epoch=tokens_per_epoch)
    return [
        step
        for step in range(1, steps + 1)
        if cadence.due(step=step, tokens=step * tokens_per_step, previous_tokens=(step - 1) * tokens_per_step)
    ]


def test_never_is_never() -> None:
    assert due_steps(None, tokens_per_step=10, steps=20) == []


def test_steps_count_from_the_start_of_the_run() -> None:
    assert due_steps(Duration(4, "steps"), tokens_per_step=10, steps=10) == [4, 8]


def test_tokens_are_due_at_the_step_that_crosses_them() -> None:
    assert due_steps(Duration(25, "tokens"), tokens_per_step=10, steps=10) == [3, 5, 8, 10]


def test_a_step_that_crosses_several_intervals_is_due_once() -> None:
    assert due_steps(Duration(3, "tokens"), tokens_per_step=10, steps=3) == [1, 2, 3]


def test_epochs() -> None:
    assert due_steps(Duration(0.5, "epochs"), tokens_per_step=10, steps=10, tokens_per_epoch=60) == [3, 6, 9]


def test_seconds_follow_the_clock_not_the_steps() -> None:
    now = [0.0]
    cadence = Cadence(Duration(10, "seconds"), clock=lambda: now[0])
    moments = []
    for step in range(1, 8):
        now[0] += 4
        if cadence.due(step=step, tokens=step, previous_tokens=step - 1):
            moments.append(now[0])
    assert moments == [12, 24]


@dataclass
class Told:
    """Stands for ranks whose first one says yes."""

    asked: list[Any] = field(default_factory=list)

    def broadcast_json(self, value: Any) -> bool:
        self.asked.append(value)
        return True


def test_the_clock_of_the_first_rank_says_when_all_do_something_together() -> None:
    told = Told()
    moment = {"step": 3, "tokens": 30, "previous_tokens": 20}
    assert not due_together(cast(Ranks, told), Cadence(Duration(4, "steps")), moment)
    assert told.asked == [], "steps are the same on all ranks"
    assert due_together(cast(Ranks, told), Cadence(Duration(1000, "seconds")), moment)
    assert told.asked == [False], "this rank's own clock says no"
