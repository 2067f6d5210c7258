"""From sections of a configuration to the plain values that optimizers, schedules and the loss scale take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.base.units import Duration
from trainwright.config import OptimSection, PrecisionSection, ScheduleSection
from trainwright.config.precision_section import BF16PurePrecision, FP16Precision
from trainwright.optim import OptimizerOptions, Rule, build_schedule
from trainwright.optim.loss_scale import LossScaleOptions

__all__ = ["learning_rate_multiplier", "optimizer_options", "scaler_options"]


WEIGHT_DECAY = 0.1
"""Where nobody settled it: of a model from scratch."""


def optimizer_options(
    section: OptimSection, precision: PrecisionSection, *, seed: int = 0, freeze: Sequence[str] = ()
) -> OptimizerOptions:
    """Everything that `build_optimizer` needs of an `optim` section with settled values.

    Args:
        seed: of rounding.
        freeze: parts of the model that are not trained (`train.freeze`).
    """
    values: dict[str, Any] = dict(section) | {"freeze": tuple(freeze)}
    if values["weight_decay"] == "auto":
        values["weight_decay"] = WEIGHT_DECAY
    for key in ("schedule", "clip_norm"):
        del values[key]
    rules = tuple(Rule(**dict(rule)) for rule in values.pop("rules"))
    half_update = precision.update if isinstance(precision, BF16PurePrecision) else "master"
    return OptimizerOptions(**values, rules=rules, half_update=half_update, seed=seed)


def learning_rate_multiplier(
    section: ScheduleSection, steps: int, tokens_per_step: float | None = None
) -> Callable[[int], float]:
    """The schedule as a function of the step, for a run of `steps` optimizer steps.

    Args:
        tokens_per_step: for a warm-up that is given in tokens.
    """
    options: dict[str, Any] = dict(section)
    name, warmup = options.pop("name"), options.pop("warmup", None)
    if warmup is not None:
        options["warmup_steps"] = _warmup_steps(warmup, steps, tokens_per_step)
    return build_schedule(name, steps, **options)


def _warmup_steps(warmup: Duration | float, steps: int, tokens_per_step: float | None) -> int:
    if not isinstance(warmup, Duration):
        return round(warmup * steps)
    if warmup.unit == "steps":
        return int(warmup.value)
    if warmup.unit == "tokens" and tokens_per_step is not None:
        return math.ceil(warmup.value / tokens_per_step)
    raise ConfigError(
        f"optim.schedule.warmup is {warmup}", hint="give it in steps or tokens, or as a fraction of the run (0.05)"
    )


def scaler_options(section: PrecisionSection) -> LossScaleOptions:
    """The loss scale of `precision: fp16`; its defaults where nothing was said."""
    if not isinstance(section, FP16Precision):
        return LossScaleOptions()
    return LossScaleOptions(
        static=None if section.loss_scale == "dynamic" else float(section.loss_scale),
        initial_scale=section.initial_scale,
        window=section.window,
        hysteresis=section.hysteresis,
        min_scale=section.min_scale,
    )
