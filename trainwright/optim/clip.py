"""Gradient norm, scaling and clipping in as few passes over memory as there can be.

The engine's gradients are sums over tokens, so every step scales them by 1 / tokens anyway: that factor and clipping's
are one number, applied once. `clip_factor` gives the number to `optimizer.step(gradient_factor=...)`, which saves the
pass altogether where the kernel folds it in.

Gradients of divided parameters are there in part: squared norms add up over the ranks, and what several ranks hold
alike must count once. `squared_norm_sum` divides each parameter's by the number of ranks that hold the same, so that a
sum over all ranks is right whatever the layout, and a caller can send its part together with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainwright.optim.shard import Shard, local_gradient, local_part, parts_of, shard_of

__all__ = [
    "clip_factor",
    "clip_gradients",
    "gradient_norm",
    "parts_of",
    "squared_norm_sum",
]

ROUNDING_GUARD = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm; the same here, so that results compare."""


@torch.no_grad()
def squared_norm_sum(parameters: Iterable[Tensor], holders: Callable[[Tensor], int]) -> Tensor:
    """The sum over `parameters` of |this rank's gradient|^2 / holders(parameter): an fp64 scalar on their device.

    The norm of each gradient is fp32, their squares add up in fp64; one pass, no communication, no waiting. Parameters
    without a gradient are left out. NaN and infinity pass through.

    Args:
        holders: how many ranks, of those over which the result is summed, hold the same part of a parameter
            (`ranks // parts_of(parameter)`, where the ranks are those that train the parameter).
    """
    known = list(parameters)
    parts: dict[int, list[Tensor]] = {}
    for p in known:
        grad = local_gradient(p)
        if grad is not None:
            parts.setdefault(holders(p), []).append(grad)
    device = local_part(known[0]).device if known else torch.device("cpu")
    total = _zero(device)
    for count, grads in sorted(parts.items()):
        total += _sum_of_squares(grads, device) / count
    return total


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients together, an fp32 scalar on the first parameter's device; one pass.

    Without any gradient it is 0. Where parameters are divided, every rank of their meshes must make this call: it sums
    over the mesh dimensions that divide them. (Parameters on other ranks only, of other pipeline stages, are not seen.)
    """
    known = list(parameters)
    device = local_part(known[0]).device if known else torch.device("cpu")
    divided: dict[tuple[DeviceMesh, tuple[int, ...]], tuple[Shard, list[Tensor]]] = {}
    whole: list[Tensor] = []
    for p in known:
        shard, grad = shard_of(p), local_gradient(p)
        grads = whole
        if shard is not None and shard.parts > 1:
            # Made for parameters without a gradient too: all ranks must make the same sums.
            grads = divided.setdefault((shard.mesh, shard.mesh_dims), (shard, []))[1]
        if grad is not None:
            grads.append(grad)
    total = _sum_of_squares(whole, device)
    for shard, grads in divided.values():
        squares = _sum_of_squares(grads, device)
        for group in shard.groups:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt().float()


def clip_factor(norm: Tensor, max_norm: float | None, *, scale: float | Tensor = 1.0) -> Tensor:
    """The number to multiply gradients by: `scale`, and less where `norm * scale` exceeds `max_norm`."""
    factor = torch.as_tensor(scale, dtype=norm.dtype, device=norm.device)
    if max_norm is None:
        return factor
    return factor * (max_norm / (norm * factor + ROUNDING_GUARD)).clamp(max=1.0)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None, *, scale: float | Tensor = 1.0) -> Tensor:
    """Scale all gradients by `scale`, then clip them to `max_norm`: one pass for the norm, one for both factors.

    Args:
        max_norm: largest total norm after scaling; None only scales.
        scale: what the gradients are short of being means (1 / tokens); a number or a scalar tensor.

    Returns: the total norm after scaling and before clipping. Where it is not finite the gradients hold NaN afterwards:
        the caller must look at the norm and leave the step out.
    """
    known = list(parameters)
    norm = gradient_norm(known)
    grads = [part for p in known if (part := local_gradient(p)) is not None and part.numel()]
    factor = clip_factor(norm, max_norm, scale=scale)
    # Reading a CPU scalar costs nothing; on a GPU it would wait for the whole backward pass.
    if grads and (factor.device.type != "cpu" or factor.item() != 1.0):
        for same in _alike(grads):
            torch._foreach_mul_(same, factor.to(same[0].device))
    return norm * scale


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _sum_of_squares(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    total = _zero(device)
    for same in _alike([grad for grad in grads if grad.numel()]):
        norms = torch.stack(torch._foreach_norm(same, 2, dtype=torch.float32)).to(device, total.dtype)
        total += norms.square().sum()
    return total


def _alike(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same tensors, those of one device and type together."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(kinds.values())
