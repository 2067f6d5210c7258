"""`config.json` of Mixtral, Qwen 2 MoE, Qwen 3 MoE and dots.llm1; what they share with llama is read and written there.

Keys that transformers does not have (it keeps them) are written only where they are not at their defaults.
"""

from __future__ import annotations

from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.hf_fields import integer, number, refuse_unsupported, required, token_ids, token_ids_to_hf
from trainwright.models.llama.hf_config import read_rope, write_rope
from trainwright.models.moe.config import MOE_ARCHITECTURES, MoEConfig

__all__ = ["HF_CLASSES", "from_hf", "to_hf"]

HF_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
}

# Defaults that transformers fills in when a config.json omits the key.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "qwen2_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    "dots1": {"max_position_embeddings": 2048, "num_key_value_heads": 32, "moe_intermediate_size": 1408},
}


def from_hf(values: dict[str, Any]) -> MoEConfig:
    """A parsed `config.json` as a MoEConfig.

    Raises:
        ModelError: a key is missing, has the wrong type, or asks for something that is not supported.
    """
    architecture = str(required(values, "model_type"))
    if architecture not in HF_CLASSES:
        raise ModelError(f"model_type={architecture!r} is not of the moe family ({', '.join(MOE_ARCHITECTURES)})")
    values = {**_DEFAULTS[architecture], **values}
    refuse_unsupported(values, {"hidden_act": ("silu", "swish"), "router_jitter_noise": (0, 0.0, None)})
    num_heads, hidden_size = integer(values, "num_attention_heads"), integer(values, "hidden_size")
    num_layers, max_positions = integer(values, "num_hidden_layers"), integer(values, "max_position_embeddings")
    theta, scaling = read_rope(values, max_positions)
    biased = bool(values.get("attention_bias", False)) if architecture in ("qwen3_moe", "dots1") else False
    window, sliding_layers = _read_sliding(values, architecture, num_layers)
    return MoEConfig(
        architecture=architecture,
        vocab_size=integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=integer(values, "num_key_value_heads", default=num_heads),
        head_dim=integer(values, "head_dim", default=hidden_size // num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=number(values, "rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bool(values["qkv_bias"]) if architecture == "qwen2_moe" else biased,
        output_bias=biased,
        qk_norm=architecture in ("qwen3_moe", "dots1"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_dropout=number(values, "attention_dropout", default=0.0),
        initializer_range=number(values, "initializer_range", default=0.02),
        bos_token_id=integer(values, "bos_token_id", default=None),
        eos_token_id=token_ids(values, "eos_token_id"),
        pad_token_id=integer(values, "pad_token_id", default=None),
        **_read_experts(values, architecture, num_layers),
    )


def _read_experts(values: dict[str, Any], architecture: str, num_layers: int) -> dict[str, Any]:
    read: dict[str, Any] = {
        "experts_per_token": integer(values, "num_experts_per_tok"),
        "capacity_factor": number(values, "capacity_factor") if values.get("capacity_factor") is not None else None,
        "auxiliary_weight": number(values, "router_aux_loss_coef", default=0.0 if architecture == "dots1" else 0.001),
    }
    if architecture == "dots1":
        size = integer(values, "moe_intermediate_size")
        return read | {
            "num_experts": integer(values, "n_routed_experts"),
            "expert_size": size,
            "dense_layers": tuple(range(integer(values, "first_k_dense_replace", default=0))),
            "router_scores": "sigmoid",
            "norm_topk": bool(values.get("norm_topk_prob", False)),
            "routed_scale": number(values, "routed_scaling_factor", default=1.0),
            "expert_groups": integer(values, "n_group", default=1),
            "groups_per_token": integer(values, "topk_group", default=1),
            "shared_size": size * integer(values, "n_shared_experts"),
            "bias_rate": number(values, "bias_update_rate", default=0.0),
        }
    if architecture == "mixtral":
        return read | {
            "num_experts": _num_experts(values, 8),
            "expert_size": integer(values, "intermediate_size"),
        }
    shared = architecture == "qwen2_moe"
    return read | {
        "num_experts": _num_experts(values, 128),
        "expert_size": integer(values, "moe_intermediate_size"),
        "dense_layers": _read_dense_layers(values, num_layers),
        "norm_topk": bool(values.get("norm_topk_prob", False)),
        "shared_size": integer(values, "shared_expert_intermediate_size") if shared else 0,
        "shared_gate": shared,
    }


def _num_experts(values: dict[str, Any], default: int) -> int:
    """Files written by some releases call it one way, by others the other."""
    return integer(values, "num_local_experts", default=integer(values, "num_experts", default=default))


def _read_dense_layers(values: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    step = integer(values, "decoder_sparse_step", default=1)
    plain = values.get("mlp_only_layers") or []
    return tuple(layer for layer in range(num_layers) if layer in plain or (layer + 1) % step)


def _read_sliding(
    values: dict[str, Any], architecture: str, num_layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    window = values.get("sliding_window")
    if architecture == "mixtral":
        return (int(window) if window is not None else None), None
    if architecture in ("qwen2_moe", "qwen3_moe") and not values.get("use_sliding_window", False):
        return None, None
    if not window:
        return None, None
    if architecture == "qwen3_moe":
        return int(window), None
    kinds = values.get("layer_types")
    if kinds is None:
        first = int(values.get("max_window_layers", 28 if architecture == "qwen2_moe" else 62))
        # Qwen 2 MoE slides in every other layer below, dots.llm1 in all layers from there on.
        slides = [
            layer % 2 == 0 and layer < first if architecture == "qwen2_moe" else layer >= first
            for layer in range(num_layers)
        ]
    else:
        unknown = sorted(set(map(str, kinds)) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != num_layers:
            raise ModelError(f"layer_types: {len(kinds)} entries for {num_layers} layers; unsupported: {unknown}")
        slides = [kind == "sliding_attention" for kind in kinds]
    layers = tuple(layer for layer, slide in enumerate(slides) if slide)
    if not layers:
        return None, None
    return int(window), None if len(layers) == num_layers else layers


def to_hf(config: MoEConfig) -> dict[str, Any]:
    """The `config.json` that transformers opens as the same model."""
    values: dict[str, Any] = {
        "architectures": [HF_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size if config.architecture == "mixtral" else config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.auxiliary_weight,
        **write_rope(config),
        **_write_sliding(config),
        **_write_experts(config),
    }
    if config.capacity_factor is not None:
        values["capacity_factor"] = config.capacity_factor
    if config.bias_rate:
        values["bias_update_rate"] = config.bias_rate
    return values


def _write_experts(config: MoEConfig) -> dict[str, Any]:
    if config.architecture == "mixtral":
        return {"num_local_experts": config.num_experts}
    values: dict[str, Any] = {"moe_intermediate_size": config.expert_size, "norm_topk_prob": config.norm_topk}
    if config.architecture == "dots1":
        return values | {
            "attention_bias": config.qkv_bias,
            "n_routed_experts": config.num_experts,
            "n_shared_experts": config.shared_size // config.expert_size,
            "first_k_dense_replace": len(config.dense_layers),
            "routed_scaling_factor": config.routed_scale,
            "n_group": config.expert_groups,
            "topk_group": config.groups_per_token,
        }
    values |= {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
    if config.architecture == "qwen2_moe":
        return values | {
            "num_experts": config.num_experts,
            "shared_expert_intermediate_size": config.shared_size,
            "qkv_bias": config.qkv_bias,
        }
    return values | {"num_experts": config.num_experts, "attention_bias": config.qkv_bias}


def _write_sliding(config: MoEConfig) -> dict[str, Any]:
    if config.architecture == "mixtral":
        return {"sliding_window": config.sliding_window}
    if config.architecture == "qwen3_moe":
        return {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    slides = [config.window_of(layer) is not None for layer in range(config.num_layers)]
    values: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }
    if config.architecture == "qwen2_moe":
        values["use_sliding_window"] = config.sliding_window is not None
    return values
