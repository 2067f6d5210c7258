"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), both layouts, with the common ways to stretch the
context.

`rotary_tables` gives cos and sin in fp32 once per batch; `apply_rotary` turns queries and keys by them. The tables
hold one column for each *pair* of channels, [..., head_dim / 2]; Hugging Face keeps the same numbers twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.base.errors import ModelError

__all__ = ["RotaryLayout", "RotaryScaling", "apply_rotary", "inverse_frequencies", "rotary_tables"]

RotaryLayout = Literal["half", "interleaved"]
_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryScaling:
    """How frequencies are changed for contexts longer than those of pretraining.

    kind: "default" (no change), "linear" (Chen et al. 2023, arXiv 2306.15595), "dynamic" (NTK-aware, base grows with
    the length), "llama3" (Llama 3.1, by wavelength) or "yarn" (Peng et al. 2023, arXiv 2309.00071).
    original_max_positions: context length of pretraining; needed by all kinds but "default" and "linear".
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ModelError(f"unknown rotary scaling {self.kind!r}", hint=f"use one of: {', '.join(_KINDS)}")
        if self.kind in ("dynamic", "llama3", "yarn") and not self.original_max_positions:
            raise ModelError(
                f"rotary scaling {self.kind!r} needs the context length of pretraining",
                hint="give original_max_position_embeddings in rope_scaling, or max_position_embeddings",
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any] | None, *, max_positions: int | None = None) -> RotaryScaling:
        """Read the `rope_scaling` / `rope_parameters` dict of a Hugging Face config.

        max_positions: the config's max_position_embeddings, which stands in where the dict names no original length.
        For "dynamic" it *is* the original length, whatever the dict says: so transformers reads it.
        """
        values = values or {}
        kind = values.get("rope_type") or values.get("type") or "default"
        original = values.get("original_max_position_embeddings") or max_positions
        if kind == "dynamic":
            original = max_positions or original
        factor = values.get("factor")
        if factor is None:
            factor = max_positions / original if kind == "yarn" and max_positions and original else 1.0
        return cls(
            kind=kind,
            factor=float(factor),
            original_max_positions=original,
            low_freq_factor=float(values.get("low_freq_factor") or 1.0),
            high_freq_factor=float(values.get("high_freq_factor") or 4.0),
            beta_fast=float(values.get("beta_fast") or 32.0),
            beta_slow=float(values.get("beta_slow") or 1.0),
            attention_factor=values.get("attention_factor"),
            mscale=values.get("mscale"),
            mscale_all_dim=values.get("mscale_all_dim"),
            truncate=bool(values.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` dict with the keys that `kind` uses; empty for "default"."""
        common = {"rope_type": self.kind, "factor": self.factor}
        original = {"original_max_position_embeddings": self.original_max_positions}
        if self.kind == "default":
            return {}
        if self.kind == "llama3":
            bands = {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
            return {**common, **original, **bands}
        if self.kind == "yarn":
            optional = {
                "attention_factor": self.attention_factor,
                "mscale": self.mscale,
                "mscale_all_dim": self.mscale_all_dim,
            }
            given = {key: value for key, value in optional.items() if value is not None}
            betas = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            return {**common, **original, **betas, **given}
        return common


def inverse_frequencies(
    head_dim: int,
    theta: float = 10000.0,
    scaling: RotaryScaling | None = None,
    *,
    sequence_length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Angular speed of each channel pair, fp32 [head_dim / 2], and the factor that cos and sin are multiplied by.

    sequence_length: longest position + 1; only "dynamic" reads it.
    """
    scaling = scaling or RotaryScaling()
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if scaling.kind == "dynamic":
        theta = _dynamic_theta(head_dim, theta, scaling, sequence_length)
    plain = 1.0 / theta**exponents
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(plain, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn_frequencies(theta**exponents, head_dim, theta, scaling), _yarn_attention_factor(scaling)
    return plain, 1.0


def rotary_tables(
    head_dim: int,
    positions: int | Tensor,
    theta: float = 10000.0,
    scaling: RotaryScaling | None = None,
    *,
    sequence_length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin in fp32, each [*positions.shape, head_dim / 2].

    positions: a tensor of position ids, or an int n that stands for 0 .. n-1 (then `device` says where).
    sequence_length: for "dynamic" scaling, longest position + 1. Left out, it is read from `positions` (on a GPU: a
    wait).
    """
    if isinstance(positions, int):
        sequence_length = sequence_length or positions
        positions = torch.arange(positions, device=device)
    elif sequence_length is None and scaling is not None and scaling.kind == "dynamic":
        sequence_length = int(positions.max()) + 1
    frequencies, factor = inverse_frequencies(
        head_dim, theta, scaling, sequence_length=sequence_length, device=positions.device
    )
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return angles.cos() * factor, angles.sin() * factor


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout = "half"
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys [B, T, H, D] by tables [T, D/2] or [B, T, D/2]; computed in fp32, returned in their dtype.

    layout: "half" pairs channel i with i + D/2 (Hugging Face weights); "interleaved" pairs 2i with 2i + 1 (the paper,
    and Llama weights as Meta published them).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _turn(q, cos, sin, layout), _turn(k, cos, sin, layout)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    if layout == "half":
        first, second = wide.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    if layout == "interleaved":
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)
    raise ModelError(f"unknown rotary layout {layout!r}", hint="use 'half' or 'interleaved'")


def _dynamic_theta(head_dim: int, theta: float, scaling: RotaryScaling, sequence_length: int | None) -> float:
    original = scaling.original_max_positions
    assert original is not None, "RotaryScaling checks this when it is made"
    length = max(sequence_length or 0, original)
    growth = scaling.factor * length / original - (scaling.factor - 1)
    return float(theta * growth ** (head_dim / (head_dim - 2)))


def _llama3_frequencies(plain: Tensor, scaling: RotaryScaling) -> Tensor:
    """Slow channels are divided by `factor`, fast ones stay, those between are blended (meta-llama: apply_scaling)."""
    original = scaling.original_max_positions
    assert original is not None, "RotaryScaling checks this when it is made"
    wavelength = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    slow = torch.where(wavelength > original / low, plain / scaling.factor, blended)
    return torch.where(wavelength < original / high, plain, slow)


def _yarn_frequencies(periods: Tensor, head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """Blend of interpolated and plain frequencies along a ramp between two channel indices (YaRN, section 3.2)."""
    original = scaling.original_max_positions
    assert original is not None, "RotaryScaling checks this when it is made"

    def channel(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=periods.device) - low) / width).clamp(0, 1)
    plain_share = 1 - ramp
    return (1.0 / (scaling.factor * periods)) * (1 - plain_share) + (1.0 / periods) * plain_share


def _yarn_attention_factor(scaling: RotaryScaling) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
