"""Muon: momentum whose update is the nearest orthogonal matrix, for the hidden matrices of a network.

Method: Keller Jordan, https://kellerjordan.github.io/posts/muon/ ; learning-rate matching: Moonlight, 2502.16982.
Not built on torch.optim.Muon (2.13 has it, and tests compare to it): that one computes in bf16 only, which is slow or
coarse on machines without bf16 units, and one matrix at a time; here equal shapes run as one batched product on GPUs.

Shape suffixes: B matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainwright.base.device import device_facts
from trainwright.optim.optimizer import Algorithm, ParameterState

__all__ = ["MUON", "newton_schulz", "update_scale"]

# Chosen by Keller Jordan for the steepest slope at zero: singular values end in about [0.7, 1.2], not at exactly 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def newton_schulz(matrix: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately U V^T of `matrix` = U S V^T ([..., M, N], any leading batch), in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.to(dtype)
    x = x.mT if tall else x  # the Gram matrix below is then the smaller of the two
    # The Frobenius norm is at least the spectral norm, so every singular value starts in [0, 1].
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = _fma(x, a, _fma(gram, b, gram @ gram, c) @ x, 1.0)
    return x.mT if tall else x


def _fma(x: Tensor, alpha: float, y: Tensor, beta: float) -> Tensor:
    return torch.add(x * alpha, y, alpha=beta)


def update_scale(rows: int, columns: int, adjust: str) -> float:
    """What an orthogonal update is multiplied by; see `OptimizerOptions.lr_adjust`.

    An orthogonal M x N matrix has root mean square 1/sqrt(max(M, N)); AdamW's updates have about 0.2 (2502.16982).
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _init(parameter: Tensor, group: dict[str, Any]) -> ParameterState:
    return {"momentum_buffer": torch.zeros_like(parameter)}


def _update(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[ParameterState],
    gradient_factor: Tensor | None,
) -> None:
    momentum = group["momentum"]
    buffers = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    directions = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    dtype = _iteration_dtype(group["newton_schulz_dtype"], params[0].device)
    for indices in _batches(params):
        rows, columns = params[indices[0]].shape[-2:]
        size = -group["lr"] * update_scale(rows, columns, group["lr_adjust"])
        stacked = torch.stack([directions[i] for i in indices]) if len(indices) > 1 else directions[indices[0]][None]
        orthogonal = newton_schulz(stacked, steps=group["newton_schulz_steps"], dtype=dtype)
        for i, update in zip(indices, orthogonal, strict=True):
            params[i].add_(update.to(params[i].dtype), alpha=size)


def _batches(params: list[Tensor]) -> list[list[int]]:
    """Indices of parameters that are orthogonalised together: equal shapes on GPUs, where small products do not fill
    the device; one at a time on CPUs, where they do and a batch would only fall out of the cache."""
    if params[0].device.type == "cpu":
        return [[i] for i in range(len(params))]
    by_shape: dict[torch.Size, list[int]] = {}
    for i, param in enumerate(params):
        by_shape.setdefault(param.shape, []).append(i)
    return list(by_shape.values())


def _iteration_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        kind = device.type
        has_bf16 = kind in ("cpu", "cuda", "mps") and device_facts(kind).bf16
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


MUON = Algorithm(init=_init, update=_update)
