"""Expert parameters in a Hugging Face file: one tensor for each matrix of each expert, under the names of the hub.

transformers joins them in memory, and writes and reads them apart: `block_sparse_moe.experts.3.w1.weight` (Mixtral),
`mlp.experts.3.gate_proj.weight` (the others).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainwright.models.moe.config import MoEConfig
from trainwright.models.weights import FilePart, WeightFormat

__all__ = ["MOE_WEIGHTS"]

_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _parts(config: MoEConfig, name: str, shape: Sequence[int]) -> list[FilePart]:
    trunk, _, kind = name.rpartition(".")
    if trunk.endswith(".mlp.experts"):
        place = _renamed(config, trunk)
        word = _MIXTRAL_NAMES[kind] if config.architecture == "mixtral" else kind
        return [FilePart(f"{place}.{expert}.{word}.weight", expert) for expert in range(shape[0])]
    return [FilePart(_renamed(config, name), None)]


def _renamed(config: MoEConfig, name: str) -> str:
    if config.architecture == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe.")
    if config.architecture == "dots1":
        return name.replace(".mlp.shared_expert.", ".mlp.shared_experts.")
    return name


def _as_it_is(config: MoEConfig, name: str, tensor: Tensor) -> Tensor:
    return tensor


def _file_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


def _zeros(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    return {}


MOE_WEIGHTS = WeightFormat(
    prefix="model.",
    to_file=_as_it_is,
    from_file=_as_it_is,
    file_shape=_file_shape,
    zeros=_zeros,
    ignored=("rotary_emb.inv_freq",),
    parts=_parts,
    fp32=(".e_score_correction_bias",),
)
