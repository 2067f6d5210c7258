"""The structure of a gpt2 model as plain data."""

from __future__ import annotations

from trainwright.models.gpt2.config import GPT2Config
from trainwright.models.structure import ModelPlan, SplitLinear

__all__ = ["plan"]


def plan(config: GPT2Config) -> ModelPlan:
    """Where the parts of a gpt2 model are and how its linears may be divided."""
    return ModelPlan(
        blocks="transformer.h",
        num_blocks=config.num_layers,
        embedding="transformer.wte",
        position_embedding="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        tied=(("transformer.wte.weight", "lm_head.weight"),) if config.tie_embeddings else (),
        linears=(
            SplitLinear("attn.c_attn", "column", config.num_heads),
            SplitLinear("attn.c_proj", "row", config.num_heads),
            SplitLinear("mlp.c_fc", "column", config.intermediate_size),
            SplitLinear("mlp.c_proj", "row", config.intermediate_size),
        ),
        norms=("ln_1", "ln_2"),
        cheap=("ln_1", "ln_2", "attn.resid_dropout", "mlp.dropout"),
    )
