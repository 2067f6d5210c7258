"""Parameters, compute and cache size of a configuration, counted without building it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from trainwright.models.moe.config import MoEConfig
from trainwright.models.registry import ModelConfig, build_model

__all__ = ["count_active_parameters", "count_flops", "count_matmul_parameters", "count_parameters", "visible_keys"]


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
    skipped = (
        "embed_tokens.weight",
        "wte.weight",
        "wpe.weight",
        "embeddings.weight",
        "lm_head.weight",
        "decoder.weight",
    )
    matrices = sum(
        _active_size(config, shape)
        for name, shape in _shapes(config).items()
        if len(shape) >= 2 and not name.endswith(skipped)
    )
    return matrices + (config.vocab_size * config.hidden_size if config.head is None else 0)


def visible_keys(sequence_length: int, window: int | None) -> float:
    """Keys that a causal query sees, averaged over the positions of a sequence."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    seen_in_full = (sequence_length - window) * window
    return (window * (window + 1) / 2 + seen_in_full) / sequence_length


def count_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token (one multiply-add is 2).

    6 per matmul parameter (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361) plus attention:
    scores and weighted sum take 2 * 2 * heads * head_dim per visible key forward, three times that with backward.
    Only keys that the mask lets through are counted, so a kernel that skips blocks can come near 100 % and none above.
    """
    windows = config.layer_windows()
    keys = sum(sequence_length if config.family == "bert" else visible_keys(sequence_length, w) for w in windows)
    attention = 12.0 * config.num_heads * config.head_dim * keys
    return 6.0 * count_matmul_parameters(config) + attention
