"""GPT-2 parameters in a Hugging Face file: linears are stored [in, out] there (Conv1D), and biases always exist.

The fused projection has all queries, then all keys, then all values in the file; here its rows go head by head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainwright.models.gpt2.config import GPT2Config
from trainwright.models.weights import WeightFormat

__all__ = ["GPT2_WEIGHTS"]

_FUSED = ("c_attn.weight", "c_attn.bias")
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def _to_file(config: GPT2Config, name: str, tensor: Tensor) -> Tensor:
    if name.endswith(_FUSED):  # rows [head, (q, k, v), head_dim] -> [(q, k, v), head, head_dim]
        tensor = tensor.unflatten(0, (config.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.t() if name.endswith(_CONV1D) else tensor


def _from_file(config: GPT2Config, name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.t() if name.endswith(_CONV1D) else tensor
    if name.endswith(_FUSED):
        tensor = tensor.unflatten(0, (3, config.num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return tensor


def _file_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(reversed(shape)) if name.endswith(_CONV1D) else tuple(shape)


def _zeros(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    if config.bias:
        return {}
    width, inner = config.hidden_size, config.intermediate_size
    per_block = {
        "ln_1.bias": width,
        "ln_2.bias": width,
        "attn.c_attn.bias": 3 * width,
        "attn.c_proj.bias": width,
        "mlp.c_fc.bias": inner,
        "mlp.c_proj.bias": width,
    }
    shapes = {
        f"transformer.h.{layer}.{name}": (size,)
        for layer in range(config.num_layers)
        for name, size in per_block.items()
    }
    return {**shapes, "transformer.ln_f.bias": (width,)}


GPT2_WEIGHTS = WeightFormat(
    prefix="transformer.",
    to_file=_to_file,
    from_file=_from_file,
    file_shape=_file_shape,
    zeros=_zeros,
    ignored=(".attn.bias", ".attn.masked_bias"),
)
