"""Named sizes of the llama family. The small ones are ours; from 1b on they are the published models' dimensions."""

from __future__ import annotations

from typing import Any

from trainwright.models.llama.config import LlamaConfig
from trainwright.ops.rotary import RotaryScaling

__all__ = ["LLAMA_PRESETS"]


def _llama(layers: int, hidden: int, heads: int, intermediate: int, vocab: int, **changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }
    return LlamaConfig(**{**values, **changes})


def _llama3_scaling(factor: float) -> RotaryScaling:
    return RotaryScaling(
        kind="llama3", factor=factor, original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


_LLAMA3: dict[str, Any] = {
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA2: dict[str, Any] = {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
_QWEN2: dict[str, Any] = {
    "architecture": "qwen2",
    "qkv_bias": True,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_QWEN3: dict[str, Any] = {
    "architecture": "qwen3",
    "qk_norm": True,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

LLAMA_PRESETS: dict[str, LlamaConfig] = {
    "llama-1m": _llama(4, 128, 4, 344, 4096, tie_embeddings=True),
    "llama-5m": _llama(5, 256, 4, 688, 4096, tie_embeddings=True),
    "llama-15m": _llama(7, 384, 6, 1024, 8192, tie_embeddings=True),
    "llama-34m": _llama(8, 512, 8, 1376, 8192),
    "llama-60m": _llama(10, 640, 10, 1728, 8192),
    "llama-125m": _llama(14, 768, 12, 2048, 32000, tie_embeddings=True),
    "llama-350m": _llama(24, 1024, 16, 2816, 32000, tie_embeddings=True),
    # Llama 3.2 1B and 3B
    "llama-1b": _llama(16, 2048, 32, 8192, 128256, **_LLAMA3, tie_embeddings=True, rope_scaling=_llama3_scaling(32.0)),
    "llama-3b": _llama(28, 3072, 24, 8192, 128256, **_LLAMA3, tie_embeddings=True, rope_scaling=_llama3_scaling(32.0)),
    # Llama 2 7B and 13B, Llama 3.1 8B, 70B and 405B
    "llama-7b": _llama(32, 4096, 32, 11008, 32000, **_LLAMA2),
    "llama-8b": _llama(32, 4096, 32, 14336, 128256, **_LLAMA3, rope_scaling=_llama3_scaling(8.0)),
    "llama-13b": _llama(40, 5120, 40, 13824, 32000, **_LLAMA2),
    "llama-70b": _llama(80, 8192, 64, 28672, 128256, **_LLAMA3, rope_scaling=_llama3_scaling(8.0)),
    "llama-405b": _llama(126, 16384, 128, 53248, 128256, **_LLAMA3, rope_scaling=_llama3_scaling(8.0)),
    # Mistral 7B v0.1
    "mistral-7b": _llama(
        32,
        4096,
        32,
        14336,
        32000,
        architecture="mistral",
        num_kv_heads=8,
        sliding_window=4096,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2-0.5b": _llama(24, 896, 14, 4864, 151936, **_QWEN2, num_kv_heads=2, tie_embeddings=True),
    "qwen2-7b": _llama(28, 3584, 28, 18944, 152064, **_QWEN2, num_kv_heads=4),
    "qwen3-0.6b": _llama(28, 1024, 16, 3072, 151936, **_QWEN3, tie_embeddings=True),
    "qwen3-8b": _llama(36, 4096, 32, 12288, 151936, **_QWEN3),
}
