"""From options to an optimizer: the one table in which names become algorithms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.optim.adafactor import ADAFACTOR
from trainwright.optim.adamw import ADAMW
from trainwright.optim.adamw_8bit import ADAMW_8BIT
from trainwright.optim.algorithm import Algorithm
from trainwright.optim.groups import make_groups
from trainwright.optim.lion import LION
from trainwright.optim.muon import MUON
from trainwright.optim.optimizer import GroupedOptimizer
from trainwright.optim.options import OptimizerOptions
from trainwright.optim.sgd import SGD

__all__ = ["ALGORITHMS", "build_optimizer"]

ALGORITHMS: dict[str, Algorithm] = {
    "adamw": ADAMW,
    "sgd": SGD,
    "adafactor": ADAFACTOR,
    "lion": LION,
    "muon": MUON,
    "adamw_8bit": ADAMW_8BIT,
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], options: OptimizerOptions, *, elsewhere: Iterable[str] = ()
) -> GroupedOptimizer:
    """The optimizer of a model, with parameter groups by the rules of `options` (see `groups.make_groups`).

    Half-precision parameters are updated as `options.half_update` says.

    Args:
        elsewhere: names of parameters of the same model that other processes hold: a rule may be for these alone.

    Raises:
        ConfigError: `half_update` needs bf16 parameters, and some are fp16; a rule is for no parameter at all.
    """
    groups = make_groups(named_parameters, options, elsewhere=elsewhere)
    for group in groups:
        group.update(_algorithm_options(group["algorithm"], options))
        group.update(half_update=options.half_update, rounding_seed=options.seed)
        if options.half_update != "master":
            _refuse_fp16(group, options.half_update)
    return GroupedOptimizer(groups, ALGORITHMS, defaults={"lr": options.lr, "weight_decay": options.weight_decay})


def _refuse_fp16(group: dict[str, Any], half_update: str) -> None:
    for name, parameter in group["params"]:
        if parameter.dtype == torch.float16:
            raise ConfigError(
                f"half_update {half_update!r} is for bf16 parameters, {name} is fp16",
                hint="use half_update master, or bf16",
            )


def _algorithm_options(algorithm: str, options: OptimizerOptions) -> dict[str, Any]:
    match algorithm:
        case "adamw" | "adamw_8bit":
            return {"betas": options.resolved_betas, "eps": options.eps, "fused": options.fused}
        case "sgd":
            return {
                "momentum": options.resolved_momentum,
                "nesterov": bool(options.nesterov),
                "fused": options.fused,
            }
        case "adafactor":
            return {"beta2_decay": options.beta2_decay, "update_clip": options.update_clip}
        case "lion":
            return {"betas": options.resolved_betas}
        case "muon":
            return {
                "momentum": options.resolved_momentum,
                "nesterov": options.nesterov is not False,
                "lr_adjust": options.lr_adjust,
                "newton_schulz_steps": options.newton_schulz_steps,
                "newton_schulz_dtype": options.newton_schulz_dtype,
            }
        case _:
            raise AssertionError(f"no options for algorithm {algorithm!r}")
