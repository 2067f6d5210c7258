"""Gradient norm, scaling and clipping in as few passes over memory as there can be.

The engine's gradients are sums over tokens, so every step scales them by 1 / tokens anyway: that factor and clipping's
are one number, applied once. `clip_factor` gives the number to `optimizer.step(gradient_factor=...)`, which saves the
pass altogether where the kernel folds it in.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_factor", "clip_gradients", "gradient_norm"]

ROUNDING_GUARD = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm; the same here, so that results compare."""


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients together, an fp32 scalar on the first gradient's device; one pass, no sync.

    Parameters without a gradient are left out; without any the norm is 0. NaN and infinity pass through.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    return _norm(grads)


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
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(grads)
    if not grads:
        return norm
    factor = clip_factor(norm, max_norm, scale=scale)
    # Reading a CPU scalar costs nothing; on a GPU it would wait for the whole backward pass.
    if factor.device.type != "cpu" or factor.item() != 1.0:
        for device_grads, device_factor in _by_device(grads, factor):
            torch._foreach_mul_(device_grads, device_factor)
    return norm * scale


def _norm(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    norms: list[Tensor] = []
    for device_grads, _ in _by_device(grads, None):
        norms += torch._foreach_norm(device_grads, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _by_device(grads: list[Tensor], factor: Tensor | None) -> list[tuple[list[Tensor], Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    none = torch.empty(0)
    return [(found, none if factor is None else factor.to(device)) for (device, _), found in kinds.items()]
