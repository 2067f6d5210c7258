"""Llama parameters in a Hugging Face file: identical, except that interleaved rotary rows are reordered to `half`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainwright.models.llama.config import LlamaConfig
from trainwright.models.weights import WeightFormat

__all__ = ["LLAMA_WEIGHTS", "interleaved_to_half"]

_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.bias")
_ROTATED_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def interleaved_to_half(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows [heads * head_dim, ...] of a q or k projection from pairs (2i, 2i+1) to (i, i + head_dim/2)."""
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2))).to(rows.device)
    return rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def _to_file(config: LlamaConfig, name: str, tensor: Tensor) -> Tensor:
    if config.rotary_layout == "interleaved" and name.endswith(_ROTATED + _ROTATED_NORMS):
        return interleaved_to_half(tensor, config.head_dim)
    return tensor


def _from_file(config: LlamaConfig, name: str, tensor: Tensor) -> Tensor:
    return tensor


def _file_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


def _zeros(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {}


LLAMA_WEIGHTS = WeightFormat(
    prefix="model.",
    to_file=_to_file,
    from_file=_from_file,
    file_shape=_file_shape,
    zeros=_zeros,
    ignored=("rotary_emb.inv_freq",),
)
