"""States to save, and a comparison that also sees types and bits."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["make_state", "same"]


def make_state(seed: int) -> dict[str, Any]:
    """A state with every kind of leaf that training has; its values depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 40, generator=generator)
    return {
        "model": {"embed.weight": weight, "head.weight": weight, "norm.weight": torch.randn(40, generator=generator)},
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(96, 40, generator=generator)},
                1: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(40, generator=generator).bfloat16()},
            },
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "params": [0, 1]}],
        },
        "data": {
            "epoch": seed // 7,
            "index": seed,
            "name": "语料",
            "best": float("nan"),
            "mask": torch.arange(9) % 2 == 0,
        },
    }


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, bit by bit for tensors; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        return torch.equal(*raw)
    if isinstance(one, dict):
        return list(one) == list(other) and all(
            type(a) is type(b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return repr(one) == repr(other)
