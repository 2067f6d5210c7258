"""How fast a run is: tokens per second, share of the machine's peak, share of time spent waiting for data, time left.

Pure arithmetic over measured step times (from a monotonic clock); nothing here looks at a clock itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["ThroughputMeter"]


@dataclass(frozen=True)
class _Step:
    tokens: int
    inputs: int
    seconds: float
    waited: float


class ThroughputMeter:
    """Rates over the last `window` steps.

    Args:
        flops_per_step: floating-point operations of a step on all ranks, forward and backward, as far as the run
            computes them (`Plan.flops_per_step`). What is counted as a trained token does not matter to it.
        peak_flops: what the ranks together reached in a measured matrix product of the run's precision, FLOP/s.
        window: steps that the rates look back.
        skip: first steps of the process left out of the rates: they compile and warm up caches.
    """

    def __init__(
        self, *, flops_per_step: float = 0.0, peak_flops: float = 0.0, window: int = 50, skip: int = 2
    ) -> None:
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self._left_out = skip
        self._steps: deque[_Step] = deque(maxlen=window)
        self._warm = False

    def step(self, *, tokens: int, seconds: float, waited: float = 0.0, inputs: int = 0) -> None:
        """Count one step.

        Args:
            tokens: trained tokens (texts, words) of the step.
            inputs: tokens that the model read in it, without padding.
            seconds: its whole duration, waiting for data included, evaluation and saving not.
            waited: the part of `seconds` spent waiting for data.
        """
        if self._left_out > 0:
            self._left_out -= 1
            # Until a warm step arrives these are the only ones to speak of; then they are forgotten.
            self._steps.append(_Step(tokens, inputs, seconds, waited))
            return
        if not self._warm:
            self._steps.clear()
            self._warm = True
        self._steps.append(_Step(tokens, inputs, seconds, waited))

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the window; None before the first step."""
        return self._seconds / len(self._steps) if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first step."""
        return sum(step.tokens for step in self._steps) / self._seconds if self._seconds > 0 else None

    @property
    def inputs_per_second(self) -> float | None:
        """Tokens that the model reads, trained or not; None before the first step."""
        return sum(step.inputs for step in self._steps) / self._seconds if self._seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation (2204.02311, appendix B), against the measured peak; None when either is unknown."""
        pace = self.seconds_per_step
        if not pace or self.peak_flops <= 0 or self.flops_per_step <= 0:
            return None
        return self.flops_per_step / pace / self.peak_flops

    @property
    def data_wait(self) -> float | None:
        """Share of the window's time spent waiting for data, 0 to 1; None before the first step."""
        return sum(step.waited for step in self._steps) / self._seconds if self._seconds > 0 else None

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """Time for `remaining_steps` at the window's pace; None before the first step."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(0, remaining_steps)

    @property
    def _seconds(self) -> float:
        return sum(step.seconds for step in self._steps)
