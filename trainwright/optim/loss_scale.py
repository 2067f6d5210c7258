"""Loss scaling for fp16: the loss is multiplied so that small gradients are not flushed to zero.

The dynamic rule is the documented one of DeepSpeed's DynamicLossScaler: halve after an overflow, but only when
`hysteresis` of them have been seen; double after `window` steps without one. It differs at the floor, where it advises
instead of ending the run.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trainwright.base.errors import ConfigError
from trainwright.base.protocols import StateDict

__all__ = ["LossScaleOptions", "LossScaler", "ScaleEvent"]

LARGEST_SCALE = 2.0**100
"""Growth ends here (a run whose gradients are all zero never overflows): a loss times this still is an fp32 number."""

REMEMBERED = 100
"""Outcomes of so many recent steps are kept for the advice."""


@dataclass(frozen=True)
class LossScaleOptions:
    """Args:
    static: a fixed scale; None adapts it.
    initial_scale: the first scale of the dynamic rule.
    window: steps without an overflow after which the scale grows.
    factor: by which it grows and shrinks.
    hysteresis: overflows until the scale shrinks; every further one shrinks it again, until it has grown.
    consecutive_hysteresis: count only overflows in a row: a good step fills the tolerance up again.
    min_scale: the scale never shrinks below.
    """

    static: float | None = None
    initial_scale: float = 2.0**16
    window: int = 1000
    factor: float = 2.0
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        for key, value in (("static", self.static), ("initial_scale", self.initial_scale)):
            if value is not None and not 0 < value <= LARGEST_SCALE:
                raise ConfigError(f"loss scale option {key} is {value}, expected above 0 and at most 2 ** 100")
        if not 0 < self.min_scale <= self.initial_scale:
            raise ConfigError(
                f"loss scale option min_scale is {self.min_scale}, expected above 0 and at most "
                f"initial_scale {self.initial_scale}"
            )
        if self.window < 1 or self.hysteresis < 1 or self.factor <= 1:
            raise ConfigError(
                f"loss scale options window {self.window}, hysteresis {self.hysteresis} and factor {self.factor} "
                "must be at least 1, at least 1 and above 1"
            )


@dataclass(frozen=True)
class ScaleEvent:
    """What one step did to the scale.

    Attributes:
        overflow: the step's gradients were not finite: leave the update out.
        before, after: the scale that the step used and the one for the next.
        advice: what to do, where the scaler cannot help any more; else None.
    """

    overflow: bool
    before: float
    after: float
    advice: str | None = None


class LossScaler:
    """Holds the number to multiply losses by; tell it after every step whether gradients overflowed.

    Every rank must be told the same (the flag agreed on by all), then the scale is the same everywhere.

    Attributes:
        scale: multiply the loss by it, and gradients by its inverse (fold that into `gradient_factor`).
        steps, overflows: how many steps it was told about, and how many of them overflowed.
    """

    def __init__(self, options: LossScaleOptions | None = None) -> None:
        self.options = options or LossScaleOptions()
        self.scale = self.options.initial_scale if self.options.static is None else self.options.static
        self.steps = 0
        self.overflows = 0
        self._last_overflow = -1
        self._tolerance = self.options.hysteresis
        self._recent: deque[bool] = deque(maxlen=REMEMBERED)

    @property
    def is_dynamic(self) -> bool:
        return self.options.static is None

    def update(self, overflow: bool) -> ScaleEvent:
        """Take in the outcome of a step; raises nothing, whatever happens."""
        before = self.scale
        stuck = overflow and (not self.is_dynamic or (self._tolerance == 1 and before <= self.options.min_scale))
        self._recent.append(overflow)
        self.overflows += overflow
        if self.is_dynamic:
            self._adapt(overflow)
        self.steps += 1
        return ScaleEvent(overflow, before, self.scale, self._advice() if stuck else None)

    def _adapt(self, overflow: bool) -> None:
        options = self.options
        if overflow:
            if self._tolerance == 1:
                self.scale = max(self.scale / options.factor, options.min_scale)
            else:
                self._tolerance -= 1
            self._last_overflow = self.steps
            return
        grows = (self.steps - self._last_overflow) % options.window == 0
        if grows:
            self.scale = min(self.scale * options.factor, LARGEST_SCALE)
        if grows or options.consecutive_hysteresis:
            self._tolerance = options.hysteresis

    def _advice(self) -> str:
        where = (
            f"the smallest loss scale, {self.scale:g}" if self.is_dynamic else f"the fixed loss scale {self.scale:g}"
        )
        share = 100 * self.overflows / self.steps
        text = (
            f"fp16 gradients overflow at {where}: {sum(self._recent)} of the last {len(self._recent)} steps and "
            f"{share:.1f} % of all {self.steps} were left out. Switch to precision bf16, which has the range of fp32; "
            "or lower the learning rate or lengthen the warm-up"
        )
        if not self.is_dynamic:
            text += "; or let the scale adapt (loss_scale: dynamic)"
        if all(self._recent) and len(self._recent) >= 10:
            text += ". As no recent step was finite, look for NaN in weights or data first: they overflow at any scale"
        return text + "."

    def state_dict(self) -> StateDict:
        return {
            "scale": self.scale,
            "steps": self.steps,
            "overflows": self.overflows,
            "last_overflow": self._last_overflow,
            "tolerance": self._tolerance,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Continue where a run was; a scale that the options fix now stays as they say."""
        if self.is_dynamic:
            self.scale = max(float(state["scale"]), self.options.min_scale)
        self.steps = int(state["steps"])
        self.overflows = int(state["overflows"])
        self._last_overflow = int(state["last_overflow"])
        self._tolerance = min(int(state["tolerance"]), self.options.hysteresis)
        self._recent = deque(state["recent"], maxlen=REMEMBERED)
