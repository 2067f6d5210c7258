"""Decides whether a step's loss and gradient norm are sane: go on, leave the step out, or stop the run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainwright.base.errors import ConfigError
from trainwright.base.protocols import StateDict

__all__ = ["Decision", "SpikeGuard", "SpikeOptions", "robust_sigmas"]

Verdict = Literal["ok", "skip", "stop"]

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution, times this, is its standard deviation."""


@dataclass(frozen=True)
class SpikeOptions:
    """Args:
    on_nonfinite: what a NaN or infinite loss or gradient norm leads to: `skip`, `stop` or `ignore`.
    on_spike: the same for a loss or gradient norm far above the recent ones.
    sigmas: how far is far, in robust standard deviations of the window.
    window: how many accepted steps are remembered.
    min_history: accepted steps before spikes are judged at all; the start of a run is steep and noisy.
    max_skips: this many steps left out in a row stop the run: it does not recover by itself.
    """

    on_nonfinite: str = "skip"
    on_spike: str = "ignore"
    sigmas: float = 8.0
    window: int = 128
    min_history: int = 32
    max_skips: int = 10

    def __post_init__(self) -> None:
        for key, value in (("on_nonfinite", self.on_nonfinite), ("on_spike", self.on_spike)):
            if value not in ("skip", "stop", "ignore"):
                raise ConfigError(f"spike option {key} is {value!r}", hint="choose one of skip, stop, ignore")
        if self.sigmas <= 0 or self.max_skips < 1 or not 2 <= self.min_history <= self.window:
            raise ConfigError(f"spike options {self} need sigmas > 0, max_skips >= 1 and 2 <= min_history <= window")


@dataclass(frozen=True)
class Decision:
    """What to do with a step, and why when it is not `ok`."""

    verdict: Verdict
    reason: str = ""


def robust_sigmas(value: float, history: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `history` (negative when below).

    The deviation is at least 1 % of the median: a flat loss must not turn noise into spikes.
    """
    median = statistics.median(history)
    spread = MAD_TO_SIGMA * statistics.median([abs(entry - median) for entry in history])
    return (value - median) / max(spread, 0.01 * abs(median), 1e-12)


class SpikeGuard:
    """Remembers recent sane steps and judges each new one against them. Stateful; same inputs, same verdicts."""

    def __init__(self, options: SpikeOptions | None = None) -> None:
        self.options = options or SpikeOptions()
        self.skips_in_a_row = 0
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=self.options.window)
        self._norms: deque[float] = deque(maxlen=self.options.window)

    def decide(self, loss: float, grad_norm: float) -> Decision:
        """Judge one step before its update; only an accepted finite step enters the window."""
        action, reason = self._judge(loss, grad_norm)
        if action == "ok" or action == "ignore":
            self.skips_in_a_row = 0
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._losses.append(loss)
                self._norms.append(grad_norm)
            return Decision("ok", reason)
        if action == "stop":
            return Decision("stop", reason)
        self.skips_in_a_row += 1
        self.skipped += 1
        if self.skips_in_a_row >= self.options.max_skips:
            return Decision("stop", f"{reason}; {self.skips_in_a_row} steps in a row were left out")
        return Decision("skip", reason)

    def _judge(self, loss: float, grad_norm: float) -> tuple[str, str]:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return self.options.on_nonfinite, f"{name} is {value}"
        if len(self._losses) < self.options.min_history:
            return "ok", ""
        for name, value, history in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            sigmas = robust_sigmas(value, history)
            if sigmas > self.options.sigmas:
                median = statistics.median(history)
                reason = (
                    f"{name} {value:.4g} is {sigmas:.1f} sigma above the median {median:.4g} of {len(history)} steps"
                )
                return self.options.on_spike, reason
        return "ok", ""

    def state_dict(self) -> StateDict:
        return {
            "skips_in_a_row": self.skips_in_a_row,
            "skipped": self.skipped,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.skips_in_a_row = int(state["skips_in_a_row"])
        self.skipped = int(state["skipped"])
        self._losses = deque(state["losses"], maxlen=self.options.window)
        self._norms = deque(state["norms"], maxlen=self.options.window)
