"""Named sizes of the mixture-of-experts family. The small ones are ours; the others are the published models'."""

from __future__ import annotations

from typing import Any

from trainwright.models.moe.config import MoEConfig

__all__ = ["MOE_PRESETS"]


def _small(
    layers: int, hidden: int, heads: int, experts: int, chosen: int, size: int, vocab: int, **changes: Any
) -> Any:
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads // 2,
        "head_dim": hidden // heads,
        "intermediate_size": size,
        "vocab_size": vocab,
        "num_experts": experts,
        "experts_per_token": chosen,
        "expert_size": size,
        "auxiliary_weight": 0.01,  # Mixtral's 0.001 is for batches of millions of tokens
    }
    return MoEConfig(**{**values, **changes})


_DEEPSEEK: dict[str, Any] = {
    "architecture": "dots1",
    "router_scores": "sigmoid",
    "qk_norm": True,
    "dense_layers": (0,),
    "auxiliary_weight": 0.0,
    "bias_rate": 0.001,
}

MOE_PRESETS: dict[str, MoEConfig] = {
    "moe-tiny": _small(2, 64, 4, 4, 2, 96, 256, max_position_embeddings=128),
    "moe-8m": _small(4, 192, 6, 8, 2, 256, 4096, tie_embeddings=True),
    "moe-60m": _small(8, 384, 6, 16, 2, 384, 8192, tie_embeddings=True),
    "moe-deepseek-60m": _small(
        8, 384, 6, 32, 4, 192, 8192, **{**_DEEPSEEK, "intermediate_size": 1024}, shared_size=192, tie_embeddings=True
    ),
    "mixtral-8x7b": MoEConfig(
        architecture="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        expert_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        experts_per_token=2,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3-30b-a3b": MoEConfig(
        architecture="qwen3_moe",
        qk_norm=True,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        expert_size=768,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
}
