"""Learning-rate schedules as pure functions of the step: a multiplier of the peak learning rate, nothing remembered.

Step s (0, 1, ...) is the update about to be made; a run makes updates 0 .. total_steps - 1, and any later step gets the
final value. Every schedule opens with the same linear warm-up over `warmup_steps` updates: from `warmup_start` to 1.
By default `warmup_start` is 1 / (warmup_steps + 1): no update is wasted at a learning rate of 0; `warmup_start=0.0` is
what transformers does. With it, values equal those of transformers and torch.optim.lr_scheduler (tests compare them).
`warmup_decay`, `one_cycle_decay` and `lr_range_test` are DeepSpeed's schedules, update by update.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

from trainwright.base.errors import ConfigError

__all__ = [
    "SCHEDULES",
    "build_schedule",
    "constant",
    "cosine",
    "cyclical",
    "inverse_sqrt",
    "linear",
    "lr_range_test",
    "one_cycle",
    "one_cycle_decay",
    "polynomial",
    "warmup_decay",
    "warmup_multiplier",
    "wsd",
]


def warmup_multiplier(step: int, warmup_steps: int, warmup_start: float | None = None) -> float:
    """The linear ramp from `warmup_start` (None: 1 / (warmup_steps + 1)) at step 0 to 1 at `warmup_steps` and after."""
    if step >= warmup_steps:
        return 1.0
    start = 1.0 / (warmup_steps + 1) if warmup_start is None else warmup_start
    return start + (1.0 - start) * step / warmup_steps


def constant(step: int, total_steps: int, *, warmup_steps: int = 0, warmup_start: float | None = None) -> float:
    """1 after warm-up."""
    return warmup_multiplier(step, warmup_steps, warmup_start)


def linear(
    step: int, total_steps: int, *, warmup_steps: int = 0, warmup_start: float | None = None, min_ratio: float = 0.0
) -> float:
    """A straight line from 1 after warm-up to `min_ratio` at `total_steps`."""
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    return min_ratio + (1.0 - min_ratio) * (1.0 - _progress(step, warmup_steps, total_steps))


def cosine(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    min_ratio: float = 0.0,
    restarts: int = 0,
) -> float:
    """Half a cosine from 1 to `min_ratio` (SGDR, 1608.03983); with `restarts` that many jumps back to 1 on the way."""
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    progress = _progress(step, warmup_steps, total_steps)
    if progress < 1.0:
        progress = progress * (restarts + 1) % 1.0
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    decay_steps: int | None = None,
    decay: float = 0.2,
    shape: str = "sqrt",
    min_ratio: float = 0.0,
) -> float:
    """Warm-up, stable, decay (2404.06395): 1 until the last `decay_steps` (None: `decay` of all), then `shape`.

    Args:
        shape: `linear`; `sqrt` for 1 - sqrt(progress), the best of those compared in 2405.18392; or `cosine`.
    """
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    falling_steps = round(total_steps * decay) if decay_steps is None else decay_steps
    start = max(warmup_steps, total_steps - falling_steps)
    if step < start:
        return 1.0
    progress = _progress(step, start, total_steps)
    falling = {
        "linear": 1.0 - progress,
        "sqrt": 1.0 - math.sqrt(progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[shape]
    return min_ratio + (1.0 - min_ratio) * falling


def one_cycle(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    rise_share: float = 0.3,
    start: float = 1 / 25,
    min_ratio: float = 1 / 250_000,
    shape: str = "cosine",
) -> float:
    """Up from `start` to 1, then down to `min_ratio` (1708.07120); the numbers are those of torch's OneCycleLR.

    Args:
        warmup_steps: updates of the rise; 0 takes `rise_share` of all. The rise is this schedule's warm-up.
        shape: `cosine` or `linear`, for both ways.
    """
    # OneCycleLR's phases end at rise_share * total - 1 and total - 1; a whole number of warm-up steps ends on itself.
    peak = float(warmup_steps) if warmup_steps else rise_share * total_steps - 1.0
    last = total_steps - 1.0
    if step <= peak:
        low, high, share = start, 1.0, step / peak if peak > 0 else 1.0
    else:
        low, high, share = 1.0, min_ratio, min(1.0, (step - peak) / (last - peak)) if last > peak else 1.0
    if shape == "cosine":
        return high + (low - high) * 0.5 * (1.0 + math.cos(math.pi * share))
    return low + (high - low) * share


def cyclical(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    cycle_steps: int,
    rise_share: float = 0.5,
    min_ratio: float = 0.0,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> float:
    """Triangles between `min_ratio` and 1 (1506.01186), counted from the end of warm-up; as torch's CyclicLR.

    Args:
        cycle_steps: updates of one triangle, of which `rise_share` go up.
        mode: `triangular`; `triangular2` halves the height each cycle; `exp_range` multiplies it by gamma each step.
    """
    if step < warmup_steps:
        # Ends at `min_ratio`, where the first triangle starts.
        return min_ratio * warmup_multiplier(step, warmup_steps, warmup_start)
    position = step - warmup_steps
    rise = cycle_steps * rise_share
    cycle, within = divmod(position, cycle_steps)
    height = within / rise if within <= rise and rise else (cycle_steps - within) / (cycle_steps - rise)
    factor = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**position}[mode]
    return min_ratio + (1.0 - min_ratio) * height * factor


def inverse_sqrt(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    timescale: int | None = None,
) -> float:
    """1 / sqrt((step - warmup_steps) / timescale + 1) after warm-up (1706.03762); timescale None = max(warm-up, 1).

    With warm-up of at least 1 and no timescale of its own that is sqrt(warmup_steps / step). transformers' default
    without warm-up is a timescale of 10000.
    """
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    scale = max(warmup_steps, 1) if timescale is None else timescale
    return 1.0 / math.sqrt((step - warmup_steps) / scale + 1.0)


def polynomial(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    power: float = 1.0,
    min_ratio: float = 0.0,
) -> float:
    """min_ratio + (1 - min_ratio) * (1 - progress) ** power after warm-up."""
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    return min_ratio + (1.0 - min_ratio) * (1.0 - _progress(step, warmup_steps, total_steps)) ** power


def warmup_decay(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    warmup_shape: str = "log",
    decay: str = "none",
    min_ratio: float = 0.0,
) -> float:
    """A warm-up that is steep at first, then a constant, a line or half a cosine down to `min_ratio`.

    These are DeepSpeed's WarmupLR, WarmupDecayLR and WarmupCosineLR with its timing: its scheduler moves after an
    update, and its first move leads to the start again. So update s stands at iteration s - 1, and updates 0 and 1 are
    made at `warmup_start` (with cosine, update 0 at zero). At least two warm-up steps, as there.

    Args:
        warmup_shape: `log` for log(1 + i) / log(warmup_steps) at iteration i, or `linear` for i / warmup_steps.
        decay: `none`, `linear` or `cosine`.
    """
    iteration, warmup = step - 1, max(2, warmup_steps)
    if iteration < 0:
        return 0.0 if decay == "cosine" else warmup_start
    if iteration < warmup:
        risen = math.log(iteration + 1) / math.log(warmup) if warmup_shape == "log" else iteration / warmup
        return warmup_start + (1.0 - warmup_start) * risen
    left = max(1, total_steps - warmup)
    if decay == "linear":
        return min_ratio + (1.0 - min_ratio) * max(0.0, (total_steps - iteration) / left)
    if decay == "cosine":
        progress = min(1.0, (iteration - warmup + 1) / left)
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def one_cycle_decay(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    fall_steps: int | None = None,
    start: float = 0.0,
    rise_stairs: int = 0,
    fall_stairs: int = 0,
    decay_steps: int | None = None,
    decay_rate: float = 0.0,
) -> float:
    """Up from `start` to 1 and down again, then start / (1 + decay_rate * steps / decay_steps): DeepSpeed's OneCycle.

    The 1cycle policy of 1803.09820; the rise is the warm-up.

    Args:
        fall_steps: updates of the way down; None is as many as of the rise.
        rise_stairs, fall_stairs: that many steps of equal width in place of a line; 0 is a line.
        decay_steps: updates behind the cycle after which the decay has grown by `decay_rate`; None does not decay.
    """
    rise = max(1, warmup_steps)
    fall = rise if fall_steps is None else fall_steps
    if step < rise + fall:
        height, stairs = (step / rise, rise_stairs) if step <= rise else ((rise + fall - step) / fall, fall_stairs)
        if stairs:
            # From whole numbers: a rounded height just below a stair would fall off it.
            done, of = (step, rise) if step <= rise else (rise + fall - step, fall)
            height = (done * stairs // of) / stairs
        return start + (1.0 - start) * height
    intervals = (step - rise - fall) / decay_steps if decay_steps else 0.0
    return start / (1.0 + decay_rate * intervals)


def lr_range_test(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float | None = None,
    step_size: int = 2000,
    step_rate: float = 1.0,
    staircase: bool = False,
) -> float:
    """1 + step_rate * steps / step_size without end: raise the rate until the loss says stop (1803.09820).

    Args:
        staircase: rise once every `step_size` updates, not a little at each.
    """
    if step < warmup_steps:
        return warmup_multiplier(step, warmup_steps, warmup_start)
    position = step - warmup_steps
    return 1.0 + step_rate * (position // step_size if staircase else position / step_size)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "one_cycle": one_cycle,
    "cyclical": cyclical,
    "inverse_sqrt": inverse_sqrt,
    "polynomial": polynomial,
    "warmup_decay": warmup_decay,
    "one_cycle_decay": one_cycle_decay,
    "lr_range_test": lr_range_test,
}

WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("wsd", "shape"): ("linear", "sqrt", "cosine"),
    ("one_cycle", "shape"): ("cosine", "linear"),
    ("cyclical", "mode"): ("triangular", "triangular2", "exp_range"),
    ("warmup_decay", "warmup_shape"): ("log", "linear"),
    ("warmup_decay", "decay"): ("none", "linear", "cosine"),
}
"""(schedule, option) -> the words it takes."""
SHARES = ("min_ratio", "start", "warmup_start", "decay", "rise_share")
POSITIVE = ("cycle_steps", "timescale", "step_size")
NOT_NEGATIVE = ("restarts", "fall_steps", "rise_stairs", "fall_stairs", "decay_rate")


def build_schedule(name: str, total_steps: int, warmup_steps: int = 0, **options: Any) -> Callable[[int], float]:
    """The schedule as a function of the step alone. Raises ConfigError for an unknown or impossible option."""
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}", hint=f"choose one of {', '.join(SCHEDULES)}{_near(name)}")
    function = SCHEDULES[name]
    known = [
        key for key in inspect.signature(function).parameters if key not in ("step", "total_steps", "warmup_steps")
    ]
    if name == "cyclical" and "cycle_steps" not in options:
        raise ConfigError("schedule cyclical needs cycle_steps: the length of one cycle in optimizer steps")
    for key in options:
        if key not in known:
            raise ConfigError(f"schedule {name} has no option {key!r}", hint=f"it has {', '.join(known) or 'none'}")
    _check(name, total_steps, warmup_steps, options)

    def multiplier(step: int) -> float:
        return function(step, total_steps, warmup_steps=warmup_steps, **options)

    return multiplier


def _check(name: str, total_steps: int, warmup_steps: int, options: dict[str, Any]) -> None:
    if total_steps < 1:
        raise ConfigError(f"schedule {name}: total_steps is {total_steps}, expected at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"schedule {name}: {warmup_steps} warm-up steps in a run of {total_steps} steps",
            hint="make optim.schedule.warmup shorter or the run longer",
        )
    decay_steps = options.get("decay_steps")
    if decay_steps is not None:
        if name == "wsd" and not 0 <= decay_steps <= total_steps - warmup_steps:
            raise ConfigError(
                f"schedule {name}: {warmup_steps} warm-up and {decay_steps} decay steps do not fit in"
                f" {total_steps} steps"
            )
        if decay_steps < 0:
            raise ConfigError(f"schedule {name}: decay_steps is {decay_steps}, expected at least 0")
    for key, value in options.items():
        if (name, key) in WORDS:
            if value not in WORDS[name, key]:
                choices = ", ".join(WORDS[name, key])
                raise ConfigError(f"schedule {name}: {key} is {value!r}", hint=f"choose one of {choices}")
        elif key in SHARES and value is not None and not 0 <= value <= 1:
            raise ConfigError(f"schedule {name}: {key} is {value}, expected 0 to 1")
        elif key in POSITIVE and value is not None and value < 1:
            raise ConfigError(f"schedule {name}: {key} is {value}, expected at least 1")
        elif key in NOT_NEGATIVE and value is not None and value < 0:
            raise ConfigError(f"schedule {name}: {key} is {value}, expected at least 0")


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is from `start` to `end`, within [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _near(name: str) -> str:
    close = difflib.get_close_matches(name, SCHEDULES, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
