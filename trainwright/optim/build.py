"""From options to an optimizer: the one table in which names become algorithms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trainwright.optim.adafactor import ADAFACTOR
from trainwright.optim.adamw import ADAMW
from trainwright.optim.algorithm import Algorithm
from trainwright.optim.groups import make_groups
from trainwright.optim.lion import LION
from trainwright.optim.muon import MUON
from trainwright.optim.optimizer import GroupedOptimizer
from trainwright.optim.options import OptimizerOptions
from trainwright.optim.sgd import SGD

__all__ = ["ALGORITHMS", "build_optimizer"]

ALGORITHMS: dict[str, Algorithm] = {"adamw": ADAMW, "sgd": SGD, "adafactor": ADAFACTOR, "lion": LION, "muon": MUON}


def build_optimizer(named_parameters: Iterable[tuple[str, Tensor]], options: OptimizerOptions) -> GroupedOptimizer:
    """The optimizer of a whole model, with parameter groups by the rules of `options` (see `groups.make_groups`).

    Half-precision parameters are updated through an fp32 copy that is part of the optimizer's state.
    """
    groups = make_groups(named_parameters, options)
    for group in groups:
        group.update(_algorithm_options(group["algorithm"], options))
    return GroupedOptimizer(groups, ALGORITHMS, defaults={"lr": options.lr, "weight_decay": options.weight_decay})


def _algorithm_options(algorithm: str, options: OptimizerOptions) -> dict[str, Any]:
    match algorithm:
        case "adamw":
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
