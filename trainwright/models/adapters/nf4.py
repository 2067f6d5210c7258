"""4-bit NormalFloat: the weights of a frozen base in about 4.2 bits each (QLoRA, arXiv 2305.14314, section 3).

A row of a matrix is cut into blocks of 64; each value becomes the nearest of 16 levels, which are quantiles of a normal
distribution, times the largest magnitude of its block. These magnitudes are stored in 8 bits, as parts of the largest
of their row ("double quantisation"). Blocks and rows do not cross each other, so that a matrix that is divided by rows,
or by whole blocks of columns, is quantised as its parts are: every layout holds the same codes.

Plain integer tensors instead of a tensor subclass (torchao has one): they are filled by name, divided by FSDP2 and by
tensor parallelism, and stored in checkpoints like any other parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BLOCK", "NF4", "dequantise", "nf4_bytes", "quantise"]

BLOCK = 64
"""Values that share a magnitude: the size of the paper."""

CHUNK = 1 << 20
"""Values that are unpacked at a time, in fp32: temporary memory stays small and in the cache."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Appendix E of the paper."""


class NF4(NamedTuple):
    """A matrix [out, in] in 4 bits.

    Attributes:
        codes: int8 [out, in / 2], two levels in each, the first in the upper half. (int8, because code of transformers
            that looks at the type of a weight takes that, and only that, for a quantised one.)
        scale: int8 [out, blocks], holding 0 to 255: magnitudes of blocks as parts of `range` / 255.
        range: fp32 [out, 1], the largest magnitude of each row, rounded up to a value of bf16: whoever gathers it in
            bf16 has the same matrix.
    """

    codes: Tensor
    scale: Tensor
    range: Tensor


@torch.no_grad()
def quantise(weight: Tensor) -> NF4:
    """A matrix [out, in] in 4 bits; `in` must be even, and its last block may be short."""
    pieces = [_quantise_rows(weight[begin:stop].float()) for begin, stop in _chunks(*weight.shape)]
    return NF4(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def dequantise(packed: NF4, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] again, each value rounded once to `dtype`."""
    rows, columns = packed.codes.shape[0], 2 * packed.codes.shape[1]
    pairs = _pairs(packed.codes.device)
    pieces = [
        _dequantise_rows(NF4(*(part[begin:stop] for part in packed)), pairs).to(dtype)
        for begin, stop in _chunks(rows, columns)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def nf4_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix of this shape in 4 bits, its magnitudes included."""
    return rows * (columns // 2 + -(-columns // BLOCK) + 4)


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(columns, 1))
    for begin in range(0, max(rows, 1), step):
        yield begin, min(begin + step, rows)


def _quantise_rows(weight: Tensor) -> NF4:
    rows, columns = weight.shape
    blocks = F.pad(weight, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    magnitude = blocks.abs().amax(-1)
    largest = _up_to_bf16(magnitude.amax(-1, keepdim=True))
    scale = (magnitude * (255.0 / largest.clamp_min(torch.finfo(torch.float32).tiny))).round().to(torch.uint8)
    held = scale.float() * (largest / 255.0)
    # Levels are chosen against the magnitude as it is stored, so that its rounding is not an error of its own.
    relative = (blocks / held.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).clamp(-1.0, 1.0)
    levels = torch.tensor(LEVELS, device=weight.device)
    nearest = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    pairs = nearest.view(rows, -1)[:, :columns].unflatten(1, (-1, 2))
    codes = (pairs[..., 0] << 4) | pairs[..., 1]
    return NF4(codes.view(torch.int8), scale.view(torch.int8), largest)


def _up_to_bf16(positive: Tensor) -> Tensor:
    """The least values of bf16 that are not below these, as fp32."""
    return ((positive.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _pairs(device: torch.device) -> Tensor:
    """The two levels of each of the 256 codes, fp32 [256, 2]."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=-1)


def _dequantise_rows(packed: NF4, pairs: Tensor) -> Tensor:
    columns = 2 * packed.codes.shape[1]
    values = F.embedding(packed.codes.view(torch.uint8).int(), pairs).flatten(-2)
    scale = packed.scale.view(torch.uint8).float() * (packed.range / 255.0)
    if columns % BLOCK:
        return values * scale.repeat_interleave(BLOCK, dim=-1)[:, :columns]
    return (values.unflatten(-1, (-1, BLOCK)) * scale[..., None]).flatten(-2)
