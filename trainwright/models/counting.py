"""Parameters, compute and cache size of a configuration, counted without building it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.models.hugging_face.counting import sizes_of
from trainwright.models.moe.config import MoEConfig
from trainwright.models.registry import ModelConfig, build_model, model_plan

__all__ = [
    "attention_flops",
    "count_active_parameters",
    "count_flops",
    "count_matmul_parameters",
    "count_parameters",
    "matmul_sizes",
    "visible_keys",
]


@lru_cache(maxsize=64)
def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_model(config, device="meta").named_parameters()}


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def count_parameters(config: ModelConfig) -> int:
    """Trained parameters; a tied embedding counts once."""
    return sum(_size(shape) for shape in _shapes(config).values())


def count_active_parameters(config: ModelConfig) -> int:
    """Trained parameters that take part in computing one token: of a layer's experts, those that the token goes to."""
    return sum(_active_size(config, shape) for shape in _shapes(config).values())


def _active_size(config: ModelConfig, shape: tuple[int, ...]) -> int:
    if isinstance(config, MoEConfig) and len(shape) == 3:  # [experts, ...]
        return config.experts_per_token * _size(shape[1:])
    return _size(shape)


def count_matmul_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied by: all matrices but the embeddings, of experts those that the token goes
    to, and the head (tied or not). That of a masked language model counts whole, though few tokens pass it."""
    return sum(matmul_sizes(config).values())


def matmul_sizes(config: ModelConfig) -> dict[str, int]:
    """What `count_matmul_parameters` adds up, by name; a tied head stands under its own name."""
    if isinstance(config, HuggingFaceConfig):
        return dict(sizes_of(config).matrices)
    skipped = (
        "embed_tokens.weight",
        "wte.weight",
        "wpe.weight",
        "embeddings.weight",
        "lm_head.weight",
        "decoder.weight",
    )
    matrices = {
        name: _active_size(config, shape)
        for name, shape in _shapes(config).items()
        if len(shape) >= 2 and not name.endswith(skipped)
    }
    if config.head is None:
        matrices[f"{model_plan(config).head}.weight"] = config.vocab_size * config.hidden_size
    return matrices


def visible_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a causal query sees, averaged over the positions of a sequence."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    seen_in_full = (sequence_length - window) * window
    return (window * (window + 1) / 2 + seen_in_full) / sequence_length


def attention_flops(config: ModelConfig, sequence_length: int) -> list[float]:
    """FLOPs of one attention's scores and weighted sum in a forward pass, per token, of each layer: 2 * 2 * heads *
    head_dim per visible key. Keys that the mask hides are not counted."""
    causal = config.kind == "causal_lm" if isinstance(config, HuggingFaceConfig) else config.family != "bert"
    per_key = 4.0 * config.num_heads * config.head_dim
    return [
        per_key * (visible_keys(sequence_length, window) if causal else sequence_length)
        for window in config.layer_windows()
    ]


def count_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token (one multiply-add is 2), where every parameter is trained.

    6 per matmul parameter (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361) plus three times the
    attention's forward pass. Only keys that the mask lets through are counted, so a kernel that skips blocks can come
    near 100 % and none above.
    """
    return 6.0 * count_matmul_parameters(config) + 3.0 * sum(attention_flops(config, sequence_length))
