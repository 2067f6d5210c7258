"""How a half-precision parameter takes in updates that are smaller than its own spacing.

Each way gives an algorithm fp32 weights to update and then writes them back:

    master       an fp32 copy in the optimizer's state: 4 bytes a parameter, exact as fp32 training
    kahan        what rounding cut off, as bf16 in the state: 2 bytes, weights of about 17 bits (Kahan 1965; 2010.06192)
    stochastic   nothing kept: rounding up or down at random with the right mean (2010.06192)

The last two make fp32 weights for the time of an update only. Moments are fp32 in all three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.comm.boxes import narrow
from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.rounding import round_box, round_stochastically

__all__ = ["HALVES", "follow_weights", "initial_state", "open_weights", "write_back"]

HALVES = (torch.bfloat16, torch.float16)

MASTER = "master"
COMPENSATION = "compensation"


def initial_state(local: Tensor, group: Group, algorithm: Algorithm) -> ParameterState:
    """The state of one parameter before its first update, from this rank's part of it."""
    local = local.detach()
    if local.dtype not in HALVES:
        return algorithm.init(local, group)
    match group["half_update"]:
        case "master":
            master = local.float()
            return {MASTER: master} | algorithm.init(master, group)
        case "kahan":
            return {COMPENSATION: torch.zeros_like(local)} | algorithm.init(_as_fp32(local), group)
        case "stochastic":
            return algorithm.init(_as_fp32(local), group)
        case other:
            raise AssertionError(f"no half-precision update {other!r}")


def _as_fp32(local: Tensor) -> Tensor:
    return torch.empty_like(local, dtype=torch.float32)  # for its form; nothing is written or read


def follow_weights(local: Tensor, state: ParameterState) -> None:
    """Bring what the state knows of a parameter's weights in line with them: they came from somewhere else."""
    if MASTER in state:
        state[MASTER].copy_(local)
    if COMPENSATION in state:
        state[COMPENSATION].zero_()


def open_weights(local: Tensor, state: ParameterState) -> Tensor:
    """The fp32 weights that an algorithm updates: `local` itself where that is fp32."""
    if local.dtype not in HALVES:
        return local
    if MASTER in state:
        return state[MASTER]
    weights = local.float()
    # Exact: the sum of a number of 8 bits and a part below its spacing, of 8 bits.
    return weights.add_(state[COMPENSATION]) if COMPENSATION in state else weights


def write_back(updated: list[tuple[str, Tensor, Item]], *, step: int, seed: int) -> None:
    """Round updated fp32 weights into the parameters they belong to; all but masters may be used up.

    Args:
        updated: (name of the parameter, this rank's part of it, the item whose weights were updated).
        step: number of the optimizer step, from 1.
    """
    masters = [(local, item.weights) for _, local, item in updated if MASTER in item.state]
    if masters:
        torch._foreach_copy_([local for local, _ in masters], [weights for _, weights in masters])
    for name, local, item in updated:
        if MASTER in item.state:
            continue
        if COMPENSATION in item.state:
            local.copy_(item.weights)
            item.state[COMPENSATION].copy_(item.weights.sub_(local))
        else:
            key = derive_seed(seed, "rounding", step, name)
            if item.shard is None:
                round_stochastically(item.weights, local, key=key)
                continue
            for box in item.shard.part()[1]:  # a number's random bits are those of its place in the whole
                round_box(
                    narrow(item.weights, box.at, box.shape),
                    narrow(local, box.at, box.shape),
                    key=key,
                    offset=box.offset,
                    whole=item.shard.shape,
                )
