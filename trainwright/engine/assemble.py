"""The steps that both doors share, from settled sections to parts: the recipe's trainer and `initialize`."""

from __future__ import annotations

import re

import torch
from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.comm import Ranks
from trainwright.comm.layout import Layout
from trainwright.config import MemorySection, PrecisionSection
from trainwright.engine.precision import Precision, cast_model, compute_in_fp32
from trainwright.memory import ActivationOffload, apply_recompute
from trainwright.optim import GroupedOptimizer, StepInBackward
from trainwright.parallel import blocks_of
from trainwright.parallel.pipeline import module_names

__all__ = ["hold", "modules_named", "recompute", "release_gradients"]


def modules_named(model: nn.Module, patterns: tuple[str, ...]) -> set[nn.Module]:
    """Modules whose name one of the patterns finds.

    Raises:
        ConfigError: a pattern finds nothing, on other stages of a pipeline neither.
    """
    names = module_names(model)
    found: set[nn.Module] = set()
    for pattern in patterns:
        matches = {module for name, module in model.named_modules() if name and re.search(pattern, name)}
        if not any(re.search(pattern, name) for name in names):
            shown = ", ".join(names[:5])
            raise ConfigError(f"precision.keep_fp32 {pattern!r} matches no module", hint=f"modules: {shown}, ...")
        found |= matches
    return found


def hold(model: nn.Module, policy: Precision, section: PrecisionSection, ranks: Ranks) -> None:
    """Hold the model's parameters in the policy's type, except those of modules that are kept in fp32 throughout."""
    kept = modules_named(model, section.keep_fp32)
    cast_model(model, policy, kept)
    if policy.compute_dtype == torch.float32:
        return
    inside = {inner for module in kept for inner in module.modules() if inner is not module}
    for module in kept - inside:
        compute_in_fp32(module, policy, ranks.device.type)


def recompute(model: nn.Module, section: MemorySection, ranks: Ranks) -> None:
    """Recompute and offload the activations of the model's blocks as the section says."""
    wanted = section.recompute
    policy = wanted if isinstance(wanted, str) else {"every": wanted.every}
    policy = "none" if policy == "auto" else policy
    offload = ActivationOffload.for_device(ranks.device) if section.offload_activations else None
    apply_recompute(model, policy, blocks=[block for _, block in blocks_of(model)], offload=offload)


def release_gradients(
    optimizer: object, section: MemorySection, layout: Layout, *, clip_norm: float | None, scales_loss: bool
) -> StepInBackward | None:
    """The stepping during the backward pass, where the section asks for it.

    Raises:
        ConfigError: clipping, fp16, a client's optimizer, or a layout that needs whole gradients after the pass.
    """
    if not section.release_gradients:
        return None
    why = None
    if not isinstance(optimizer, GroupedOptimizer):
        why = "the optimizer is yours, and only Trainwright's can update one parameter at a time"
    elif scales_loss:
        why = "fp16 has to look at all gradients before it steps"
    elif layout.pipeline.stages > 1:
        why = "a pipeline runs several backward passes of a step at once"
    elif layout.data > 1 and not layout.is_sharded:
        why = "at stage 0 gradients are summed over the ranks after they are complete"
    elif layout.tensor > 1 and not layout.is_sharded:
        why = "tensor ranks without ZeRO sum the gradients of what each holds whole after the pass"
    elif layout.expert == layout.shard > 1 and layout.replicas > 1:
        why = "gradients of experts are summed over the replicas after they are complete"
    elif layout.accumulate == "sharded" and layout.zero > 1:
        why = "parallel.accumulate is sharded: parts of gradients are added up after the pass"
    if why is not None:
        raise ConfigError(f"memory.release_gradients is true, but {why}", hint="set memory.release_gradients=false")
    assert isinstance(optimizer, GroupedOptimizer)
    return StepInBackward(optimizer, clip_norm=clip_norm)
