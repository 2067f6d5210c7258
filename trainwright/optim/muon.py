"""Muon: momentum whose update is the nearest orthogonal matrix, for the hidden matrices of a network.

Method: Keller Jordan, https://kellerjordan.github.io/posts/muon/ ; learning-rate matching: Moonlight, 2502.16982.
Not built on torch.optim.Muon (2.13 has it, and tests compare to it): that one computes in bf16 only, which is slow or
coarse on machines without bf16 units, and one matrix at a time; here equal shapes run as one batched product on GPUs.
Divided matrices are orthogonalised once, not on every rank: an all-to-all for each dimension of the mesh brings each to
one rank, and another one its parts back.

Shape suffixes: B matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainwright.base.device import device_facts
from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.exchange import Exchange, alike
from trainwright.optim.shard import Shard

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


def _init(parameter: Tensor, group: Group) -> ParameterState:
    return {"momentum_buffer": torch.zeros_like(parameter)}


def _update(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    moving = [item for item in items if item.gradient is not None]
    directions = dict(zip(map(id, moving), _directions(group, moving), strict=True))
    if group["weight_decay"] and moving:
        torch._foreach_mul_([item.weights for item in moving], 1 - group["lr"] * group["weight_decay"])
    dtype = _iteration_dtype(group["newton_schulz_dtype"], items[0].weights.device)
    # A stack of matrices (experts) may be divided by matrices: then each rank has its own ones whole.
    shards = [None if item.shard is None else item.shard.over(-2, -1) for item in items]
    together = alike(shards)
    apart = {i for indices in together for i in indices}
    here = [item for i, item in enumerate(items) if i not in apart and item.gradient is not None]
    found = _orthogonal(group, [directions[id(item)] for item in here], dtype)
    for item, update in zip(here, found, strict=True):
        _apply(group, item, update)
    for indices in together:
        members = [items[i] for i in indices]
        divided = [shard for i in indices if (shard := shards[i]) is not None]
        for item, update in zip(members, _orthogonal_apart(group, members, divided, directions, dtype), strict=True):
            if item.gradient is not None:
                _apply(group, item, update)


def _directions(group: Group, items: list[Item]) -> list[Tensor]:
    if not items:
        return []
    grads = [item.grad for item in items]
    buffers = [item.state["momentum_buffer"] for item in items]
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    return list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers


def _apply(group: Group, item: Item, orthogonal: Tensor) -> None:
    rows, columns = item.shape[-2:]
    size = -group["lr"] * update_scale(rows, columns, group["lr_adjust"])
    item.weights.add_(orthogonal.to(item.weights.dtype), alpha=size)


def _orthogonal(group: Group, directions: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    result = list(directions)
    for indices in _batches(directions):
        stacked = torch.stack([directions[i] for i in indices]) if len(indices) > 1 else directions[indices[0]][None]
        for i, found in zip(
            indices, newton_schulz(stacked, steps=group["newton_schulz_steps"], dtype=dtype), strict=True
        ):
            result[i] = found
    return result


def _orthogonal_apart(
    group: Group, items: list[Item], shards: list[Shard], directions: dict[int, Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """This rank's part of orthogonalised matrices over one mesh: each is worked on by one rank, and by no other."""
    exchange = Exchange(shards, [shard.shape.numel() * min(shard.shape[-2:]) for shard in shards])
    # A parameter without a gradient travels too, as zeros: the calls may not depend on what has a gradient.
    parts = [directions[id(item)] if id(item) in directions else torch.zeros_like(item.weights) for item in items]
    # Sent in the type of the iteration: it would be the first thing to happen to them anyway.
    wholes = exchange.to_owners([part.to(dtype) for part in parts])
    found = _orthogonal(group, list(wholes.values()), dtype)
    return exchange.from_owners(dict(zip(wholes, found, strict=True)), dtype, parts[0].device)


def _batches(matrices: list[Tensor]) -> list[list[int]]:
    """Indices of matrices that are orthogonalised together: equal shapes on GPUs, where small products do not fill
    the device; one at a time on CPUs, where they do and a batch would only fall out of the cache."""
    if not matrices or matrices[0].device.type == "cpu":
        return [[i] for i in range(len(matrices))]
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    return list(by_shape.values())


def _iteration_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        kind = device.type
        has_bf16 = kind in ("cpu", "cuda", "mps") and device_facts(kind).bf16
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


MUON = Algorithm(init=_init, update=_update, whole=True)
