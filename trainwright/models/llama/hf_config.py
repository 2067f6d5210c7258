"""`config.json` of Llama, Mistral, Qwen 2 and Qwen 3, read in the spelling of every transformers release.

transformers 5 writes `rope_parameters`; older releases wrote `rope_theta` and `rope_scaling`. Both are read, and both
are written, so that either can open what we save.
"""

from __future__ import annotations

from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.hf_fields import (
    integer,
    number,
    refuse_unsupported,
    required,
    token_ids,
    token_ids_to_hf,
)
from trainwright.models.llama.config import LlamaConfig
from trainwright.ops.rotary import RotaryScaling

__all__ = ["HF_CLASSES", "from_hf", "read_rope", "to_hf", "write_rope"]

HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Defaults that transformers fills in when an (old or hand-written) config.json omits the key.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def from_hf(values: dict[str, Any]) -> LlamaConfig:
    """A parsed `config.json` as a LlamaConfig.

    Raises:
        ModelError: a key is missing, has the wrong type, or asks for something that is not supported.
    """
    architecture = str(required(values, "model_type"))
    if architecture not in HF_CLASSES:
        raise ModelError(f"model_type={architecture!r} is not of the llama family ({', '.join(HF_CLASSES)})")
    values = {**_DEFAULTS[architecture], **values}
    refuse_unsupported(values, {"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None)})
    num_heads = integer(values, "num_attention_heads")
    num_layers = integer(values, "num_hidden_layers")
    hidden_size = integer(values, "hidden_size")
    max_positions = integer(values, "max_position_embeddings")
    theta, scaling = read_rope(values, max_positions)
    biased = bool(values.get("attention_bias", False)) if architecture in ("llama", "qwen3") else False
    window, sliding_layers = _read_sliding(values, architecture, num_layers)
    return LlamaConfig(
        vocab_size=integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=integer(values, "num_key_value_heads", default=num_heads),
        head_dim=integer(values, "head_dim", default=hidden_size // num_heads),
        max_position_embeddings=max_positions,
        architecture=architecture,
        rms_norm_eps=number(values, "rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=True if architecture == "qwen2" else biased,
        output_bias=biased,
        mlp_bias=bool(values.get("mlp_bias", False)) if architecture == "llama" else False,
        qk_norm=architecture == "qwen3",
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_dropout=number(values, "attention_dropout", default=0.0),
        initializer_range=number(values, "initializer_range", default=0.02),
        bos_token_id=integer(values, "bos_token_id", default=None),
        eos_token_id=token_ids(values, "eos_token_id"),
        pad_token_id=integer(values, "pad_token_id", default=None),
    )


def read_rope(values: dict[str, Any], max_positions: int) -> tuple[float, RotaryScaling | None]:
    """Base frequency and scaling from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            f"rotary parameters per layer type are not supported (seen: {rope!r})",
            hint="one set of rotary parameters for the whole model was expected",
        )
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor={partial} is not supported; expected 1.0 (all of head_dim is turned)")
    if kind == "default":
        return theta, None
    number(rope, "factor", default=1.0)
    return theta, RotaryScaling.from_hf(rope, max_positions=max_positions)


def _read_sliding(
    values: dict[str, Any], architecture: str, num_layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    window = values.get("sliding_window")
    layer_types = values.get("layer_types")
    if layer_types is not None:
        unknown = sorted(set(map(str, layer_types)) - {"full_attention", "sliding_attention"})
        if unknown or len(layer_types) != num_layers:
            raise ModelError(
                f"layer_types: {len(layer_types)} entries for {num_layers} layers; unsupported: {unknown or 'none'}"
            )
    if architecture == "llama":
        return None, None
    if architecture == "mistral":
        if layer_types is not None and window is not None and "full_attention" in layer_types:
            raise ModelError("model_type 'mistral' with full_attention layers is not supported (layer_types)")
        return (int(window), None) if window is not None else (None, None)
    if window is None or not values.get("use_sliding_window", False):
        return None, None
    if layer_types is None:
        first = int(values.get("max_window_layers", 28))
        layers = tuple(range(min(first, num_layers), num_layers))
    else:
        layers = tuple(index for index, kind in enumerate(layer_types) if kind == "sliding_attention")
    if not layers:
        return None, None
    return int(window), None if len(layers) == num_layers else layers


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` that transformers opens as the same model."""
    architecture = config.architecture
    values: dict[str, Any] = {
        "architectures": [HF_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
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
        **write_rope(config),
    }
    if architecture in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if architecture == "llama":
        values["mlp_bias"] = config.mlp_bias
    if architecture == "mistral":
        values["sliding_window"] = config.sliding_window
    if architecture in ("qwen2", "qwen3"):
        windows = [config.window_of(layer) is not None for layer in range(config.num_layers)]
        values["use_sliding_window"] = config.sliding_window is not None
        values["sliding_window"] = config.sliding_window
        values["max_window_layers"] = windows.index(True) if True in windows else config.num_layers
        values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return values


def write_rope(config: LlamaConfig) -> dict[str, Any]:
    """Base frequency and scaling in both spellings."""
    if config.rope_scaling is None:
        return {
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }
    scaling = config.rope_scaling.to_hf()
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
    }
