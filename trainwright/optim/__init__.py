"""Optimizers, parameter groups by ordered rules, clipping, weight averaging, schedules and the loss-spike guard."""

from __future__ import annotations

from trainwright.optim.build import build_optimizer
from trainwright.optim.clip import (
    clip_factor,
    clip_gradients,
    gradient_norm,
    parts_of,
    squared_norm_sum,
)
from trainwright.optim.ema import EMA
from trainwright.optim.groups import GroupSummary, describe_groups
from trainwright.optim.loss_scale import LossScaleOptions, LossScaler, ScaleEvent
from trainwright.optim.optimizer import GroupedOptimizer
from trainwright.optim.options import OptimizerOptions, Rule
from trainwright.optim.release import StepInBackward
from trainwright.optim.schedules import build_schedule
from trainwright.optim.spike import Decision, SpikeGuard, SpikeOptions

__all__ = [
    "EMA",
    "Decision",
    "GroupSummary",
    "GroupedOptimizer",
    "LossScaleOptions",
    "LossScaler",
    "OptimizerOptions",
    "Rule",
    "ScaleEvent",
    "SpikeGuard",
    "SpikeOptions",
    "StepInBackward",
    "build_optimizer",
    "build_schedule",
    "clip_factor",
    "clip_gradients",
    "describe_groups",
    "gradient_norm",
    "parts_of",
    "squared_norm_sum",
]
