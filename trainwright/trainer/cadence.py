"""When something that happens every so often is due: by steps, tokens, epochs or the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainwright.base.units import Duration

__all__ = ["Cadence"]


class Cadence:
    """Counts in the unit of its Duration.

    Steps, tokens and epochs are counted from the start of the run, so a resumed run acts at the same steps as an
    undisturbed one. Seconds are counted on the monotonic clock from the last time it was due.

    Args:
        every: the interval, or None for never.
        tokens_per_epoch: trained tokens of one pass over the data, for intervals in epochs.
        clock: seconds on a monotonic clock.
    """

    def __init__(
        self, every: Duration | None, *, tokens_per_epoch: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every = every
        self._tokens_per_epoch = tokens_per_epoch
        self._clock = clock
        self._last_seconds = clock()

    @property
    def by_clock(self) -> bool:
        """Whether it goes by seconds, which every process counts for itself."""
        return self._every is not None and self._every.unit == "seconds"

    def due(self, *, step: int, tokens: int, previous_tokens: int) -> bool:
        """Whether the step that has just ended (1-based count `step`) crossed an interval.

        Args:
            step: optimizer steps done.
            tokens, previous_tokens: trained tokens after and before that step.
        """
        every = self._every
        if every is None:
            return False
        if every.unit == "steps":
            return step % int(every.value) == 0
        if every.unit == "seconds":
            if self._clock() - self._last_seconds < every.value:
                return False
            self._last_seconds = self._clock()
            return True
        interval = every.value if every.unit == "tokens" else every.value * self._tokens_per_epoch
        return int(tokens // interval) > int(previous_tokens // interval)
