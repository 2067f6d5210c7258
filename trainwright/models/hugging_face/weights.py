"""Parameters of a transformers model in its files: the same names, ties and prefixes as `save_pretrained` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trainwright.models.hugging_face.structure import structure
from trainwright.models.weights import FilePart, WeightFormat

if TYPE_CHECKING:
    from trainwright.models.hugging_face.config import HuggingFaceConfig

__all__ = ["HUGGING_FACE_WEIGHTS"]


def _as_it_is(config: HuggingFaceConfig, name: str, tensor: Tensor) -> Tensor:
    return tensor


def _file_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)


def _zeros(config: HuggingFaceConfig) -> dict[str, tuple[int, ...]]:
    return {}


def _parts(config: HuggingFaceConfig, name: str, shape: Sequence[int]) -> list[FilePart]:
    return [FilePart(structure(config).file_names.get(name, name), None)]


HUGGING_FACE_WEIGHTS = WeightFormat(
    prefix="",
    to_file=_as_it_is,
    from_file=_as_it_is,
    file_shape=_file_shape,
    zeros=_zeros,
    ignored=("rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias", ".attention.bias"),
    parts=_parts,
)
