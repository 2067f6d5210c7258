"""The structure of a llama model as plain data."""

from __future__ import annotations

from trainwright.models.llama.config import LlamaConfig
from trainwright.models.structure import ModelPlan, SplitLinear

__all__ = ["plan"]


def plan(config: LlamaConfig) -> ModelPlan:
    """Where the parts of a llama model are and how its linears may be divided."""
    head_norms = ("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ()
    norms = ("input_layernorm", "post_attention_layernorm", *head_norms)
    return ModelPlan(
        blocks="model.layers",
        num_blocks=config.num_layers,
        embedding="model.embed_tokens",
        position_embedding=None,
        final_norm="model.norm",
        head="lm_head",
        tied=(("model.embed_tokens.weight", "lm_head.weight"),) if config.tie_embeddings else (),
        linears=(
            SplitLinear("self_attn.q_proj", "column", config.num_heads),
            SplitLinear("self_attn.k_proj", "column", config.num_kv_heads, serves="self_attn.q_proj"),
            SplitLinear("self_attn.v_proj", "column", config.num_kv_heads, serves="self_attn.q_proj"),
            SplitLinear("self_attn.o_proj", "row", config.num_heads),
            SplitLinear("mlp.gate_proj", "column", config.intermediate_size),
            SplitLinear("mlp.up_proj", "column", config.intermediate_size),
            SplitLinear("mlp.down_proj", "row", config.intermediate_size),
        ),
        norms=norms,
        cheap=norms,
    )
