"""Sizes of tiny models, as plain values: real structure (grouped queries, gated MLP), seconds to train on a CPU."""

from __future__ import annotations

from typing import Any

__all__ = ["tiny_gpt2_config", "tiny_llama_config", "tiny_moe_config"]


def tiny_llama_config(**changes: Any) -> dict[str, Any]:
    """Arguments of `models.LlamaConfig`: about 0.1M parameters; `changes` replace or add any of them."""
    return {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        **changes,
    }


def tiny_gpt2_config(**changes: Any) -> dict[str, Any]:
    """Arguments of `models.GPT2Config`: about 0.1M parameters; `changes` replace or add any of them."""
    return {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 128,
        **changes,
    }


def tiny_moe_config(**changes: Any) -> dict[str, Any]:
    """Arguments of `models.MoEConfig`: 4 experts of which a token goes to 2; `changes` replace or add any of them."""
    return {
        **tiny_llama_config(),
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_size": 64,
        "auxiliary_weight": 0.01,
        **changes,
    }
