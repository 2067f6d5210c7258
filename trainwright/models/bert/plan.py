"""The structure of a bert model as plain data."""

from __future__ import annotations

from trainwright.models.bert.config import BertConfig
from trainwright.models.structure import ModelPlan, SplitLinear

__all__ = ["plan"]


def plan(config: BertConfig) -> ModelPlan:
    """Where the parts of a bert model are and how its linears may be divided."""
    return ModelPlan(
        blocks="bert.encoder.layer",
        num_blocks=config.num_layers,
        embedding="bert.embeddings.word_embeddings",
        position_embedding="bert.embeddings.position_embeddings",
        final_norm="bert.end",
        head="lm_head.decoder",
        tied=(("bert.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),) if config.tie_embeddings else (),
        linears=(
            SplitLinear("attention.self.query", "column", config.num_heads),
            SplitLinear("attention.self.key", "column", config.num_heads),
            SplitLinear("attention.self.value", "column", config.num_heads),
            SplitLinear("attention.output.dense", "row", config.num_heads),
            SplitLinear("intermediate.dense", "column", config.intermediate_size),
            SplitLinear("output.dense", "row", config.intermediate_size),
        ),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        cheap=("attention.output.LayerNorm", "output.LayerNorm", "attention.output.dropout", "output.dropout"),
        before="bert.embeddings",
        embedding_rest=("bert.embeddings.token_type_embeddings", "bert.embeddings.LayerNorm"),
        head_rest=("lm_head.dense", "lm_head.layer_norm"),
    )
