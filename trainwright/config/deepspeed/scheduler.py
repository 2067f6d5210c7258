"""`scheduler`: DeepSpeed's five schedules, of which some also set the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.config.deepspeed.importing import Import
from trainwright.config.deepspeed.tables import (
    BOOL,
    COUNT,
    NUMBER,
    POSITIVE,
    WHOLE,
    Choice,
    Entry,
    Maps,
    NoEffect,
    Variants,
)
from trainwright.config.fields import Real, Words

__all__ = ["SCHEDULER", "convert", "peak_of"]

RATE = Real(minimum=0)
SHAPE = Words(("log", "linear"))
RESUME = {"last_batch_iteration": NoEffect("the schedule goes on where the checkpoint says", WHOLE, -1)}

_SHAPE: Mapping[str, Entry] = {
    "warmup_num_steps": Maps("optim.schedule.warmup", POSITIVE, 1000),
    "warmup_type": Maps("optim.schedule.warmup_shape", SHAPE, "log"),
}
_TOTAL: Mapping[str, Entry] = {"total_num_steps": Maps("total_steps", POSITIVE, None, "required")}
_LOWEST = Maps("optim.schedule.warmup_start", RATE, 0.0, "as a fraction of warmup_max_lr")

WARMUP: dict[str, Entry] = {
    "warmup_min_lr": _LOWEST,
    "warmup_max_lr": Maps("optim.lr", RATE, None, "in place of the optimizer's; null leaves that"),
    **_SHAPE,
    **RESUME,
}
WARMUP_DECAY: dict[str, Entry] = {
    **_TOTAL,
    "warmup_min_lr": _LOWEST,
    "warmup_max_lr": Maps("optim.lr", RATE, 0.001, "in place of the optimizer's"),
    **_SHAPE,
    **RESUME,
}
WARMUP_COSINE: dict[str, Entry] = {
    **_TOTAL,
    "warmup_min_ratio": Maps("optim.schedule.warmup_start", RATE, 0.0),
    "cos_min_ratio": Maps("optim.schedule.min_ratio", RATE, 0.0001),
    **_SHAPE,
    **RESUME,
}
ONE_CYCLE: dict[str, Entry] = {
    "cycle_min_lr": Maps("optim.schedule.start", RATE, None, "required; as a fraction of cycle_max_lr"),
    "cycle_max_lr": Maps("optim.lr", RATE, None, "required; in place of the optimizer's"),
    "decay_lr_rate": Maps("optim.schedule.decay_rate", RATE, 0.0),
    "cycle_first_step_size": Maps("optim.schedule.warmup", POSITIVE, 2000),
    "cycle_second_step_size": Maps("optim.schedule.fall_steps", COUNT),
    "cycle_first_stair_count": Maps("optim.schedule.rise_stairs", WHOLE, 0),
    "cycle_second_stair_count": Maps("optim.schedule.fall_stairs", WHOLE, None, "null is cycle_first_stair_count"),
    "decay_step_size": Maps("optim.schedule.decay_steps", COUNT, 0),
    "cycle_momentum": Maps("optim.schedule.name", BOOL, True, "true is refused, unless the optimizer has no betas"),
    "cycle_min_mom": NoEffect("it belongs to cycle_momentum", NUMBER, 0.8),
    "cycle_max_mom": NoEffect("it belongs to cycle_momentum", NUMBER, 0.9),
    "decay_mom_rate": NoEffect("it belongs to cycle_momentum", NUMBER, 0.0),
    **RESUME,
}
RANGE_TEST: dict[str, Entry] = {
    "lr_range_test_min_lr": Maps("optim.lr", RATE, 0.001, "in place of the optimizer's"),
    "lr_range_test_step_size": Maps("optim.schedule.step_size", POSITIVE, 2000),
    "lr_range_test_step_rate": Maps("optim.schedule.step_rate", RATE, 1.0),
    "lr_range_test_staircase": Maps("optim.schedule.staircase", BOOL, False),
    **RESUME,
}

TORCH = (
    *("LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR"),
    *(
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
        "PolynomialLR",
        "CyclicLR",
        "OneCycleLR",
        "ReduceLROnPlateau",
    ),
)

SCHEDULER = Variants(
    "optim.schedule.name",
    {
        "WarmupLR": Choice(WARMUP),
        "WarmupDecayLR": Choice(WARMUP_DECAY),
        "WarmupCosineLR": Choice(WARMUP_COSINE),
        "OneCycle": Choice(ONE_CYCLE),
        "LRRangeTest": Choice(RANGE_TEST),
        **{
            name: Choice({}, f"torch's {name} by its name", "Give it to initialize(lr_scheduler=...).")
            for name in TORCH
        },
    },
)

TYPE, PARAMS = "scheduler.type", "scheduler.params."
PEAKS = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}


def peak_of(found: Import) -> str | None:
    """The key of the schedule that sets the learning rate, or None where that is the optimizer's."""
    key = PEAKS.get(found.values.get(TYPE, ""))
    return PARAMS + key if key and found.get(PARAMS + key) is not None else None


def convert(found: Import) -> None:
    """optim.schedule, total_steps and, for most schedules, optim.lr. After the optimizer's conversion."""
    kind = found.values.get(TYPE)
    if kind is None:
        found.result["optim"]["schedule"] = {"name": "constant", "warmup": 0.0}
    elif kind == "OneCycle":
        _convert_cycle(found)
    elif kind == "LRRangeTest":
        found.put(TYPE, "optim.schedule.name", "lr_range_test")
        found.put(f"{PARAMS}lr_range_test_min_lr", "optim.lr", found.get(f"{PARAMS}lr_range_test_min_lr"))
        for key in ("step_size", "step_rate", "staircase"):
            path = f"{PARAMS}lr_range_test_{key}"
            found.put(path, f"optim.schedule.{key}", found.get(path))
    else:
        _convert_warmup(found, kind)


def _steps(found: Import, key: str) -> None:
    found.put(PARAMS + key, "optim.schedule.warmup", f"{found.get(PARAMS + key)} steps")


def _convert_warmup(found: Import, kind: str) -> None:
    found.put(TYPE, "optim.schedule.name", "warmup_decay")
    found.put(f"{PARAMS}warmup_type", "optim.schedule.warmup_shape", found.get(f"{PARAMS}warmup_type"))
    _steps(found, "warmup_num_steps")
    decay = {"WarmupLR": "none", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}[kind]
    found.result["optim"]["schedule"]["decay"] = decay
    if kind != "WarmupLR":
        total = f"{PARAMS}total_num_steps"
        if not found.has(total):
            found.refuse(total, f"missing; expected the number of optimizer steps of the run: {kind} ends with it.")
        else:
            found.put(total, "total_steps", found.get(total))
    if kind == "WarmupCosineLR":
        for key, target in (("warmup_min_ratio", "warmup_start"), ("cos_min_ratio", "min_ratio")):
            found.put(PARAMS + key, f"optim.schedule.{target}", found.get(PARAMS + key))
        return
    share = _share(found, f"{PARAMS}warmup_min_lr", f"{PARAMS}warmup_max_lr")
    if share is not None:
        found.put(f"{PARAMS}warmup_min_lr", "optim.schedule.warmup_start", share)
        if kind == "WarmupDecayLR":
            found.result["optim"]["schedule"]["min_ratio"] = share


def _share(found: Import, lowest: str, highest: str) -> float | None:
    """`lowest` as a fraction of the peak, which becomes optim.lr; None when it cannot be said, and is refused."""
    low, peak = found.get(lowest), found.get(highest)
    if peak is not None:
        found.put(highest, "optim.lr", peak)
    else:
        peak = found.result["optim"].get("lr")
    if not low:
        return 0.0
    if peak is None:
        found.refuse(lowest, f"seen {low:g} without {highest}: the peak is not known here.")
        return None
    if low > peak:
        found.refuse(lowest, f"seen {low:g}, expected at most {highest}, which is {peak:g}.")
        return None
    return float(low / peak)


def _convert_cycle(found: Import) -> None:
    missing = [f"{PARAMS}{key}" for key in ("cycle_min_lr", "cycle_max_lr") if not found.has(f"{PARAMS}{key}")]
    for path in missing:
        found.refuse(path, "missing; expected a learning rate: OneCycle has no default for it.")
    found.put(TYPE, "optim.schedule.name", "one_cycle_decay")
    _steps(found, "cycle_first_step_size")
    share = None if missing else _share(found, f"{PARAMS}cycle_min_lr", f"{PARAMS}cycle_max_lr")
    if share is not None:
        found.put(f"{PARAMS}cycle_min_lr", "optim.schedule.start", share)
    first = max(0, found.get(f"{PARAMS}cycle_first_stair_count"))
    second: Any = found.get(f"{PARAMS}cycle_second_stair_count")
    found.put(
        f"{PARAMS}cycle_second_step_size", "optim.schedule.fall_steps", found.get(f"{PARAMS}cycle_second_step_size")
    )
    found.put(f"{PARAMS}cycle_first_stair_count", "optim.schedule.rise_stairs", first)
    found.put(
        f"{PARAMS}cycle_second_stair_count", "optim.schedule.fall_stairs", first if second is None else max(0, second)
    )
    rate, steps = found.get(f"{PARAMS}decay_lr_rate"), found.get(f"{PARAMS}decay_step_size")
    for path, value in ((f"{PARAMS}decay_lr_rate", rate), (f"{PARAMS}decay_step_size", steps)):
        if rate and steps:
            target = "decay_rate" if path.endswith("rate") else "decay_steps"
            found.put(path, f"optim.schedule.{target}", value)
        else:
            found.idle(path, "the learning rate decays only with both decay_lr_rate and decay_step_size")
    _check_momentum(found)


def _check_momentum(found: Import) -> None:
    path = f"{PARAMS}cycle_momentum"
    kind = found.values.get("optimizer.type")
    if not found.get(path):
        found.idle(path, "false leaves momentum alone")
    elif kind in ("SGD", "Adafactor", "Muon"):
        found.idle(path, f"DeepSpeed cycles betas, and {kind} has none")
    else:
        default = "" if found.has(path) else " (DeepSpeed's default)"
        found.refuse(path, f"seen true{default}: cycling momentum is not built yet. Set cycle_momentum to false.")
