"""The llama family: RMSNorm before each half, rotary positions, grouped-query attention, SwiGLU.

Parameter names are those of transformers. Shapes: B batch, T tokens, D hidden, H heads, K key/value heads,
E head_dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.models.attention import SelfAttention
from trainwright.models.cache import KVCache, LayerCache
from trainwright.models.decoder import Decoder
from trainwright.models.dropout import AttentionDropout
from trainwright.models.llama.config import LlamaConfig
from trainwright.ops.activation import swiglu
from trainwright.ops.norm import rms_norm
from trainwright.ops.rotary import apply_rotary, rotary_tables

__all__ = ["Attention", "LlamaBlock", "LlamaForCausalLM", "RMSNorm", "SwiGLU"]


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(SelfAttention):
    """Grouped-query attention with rotary positions; optional biases, q/k norm and sliding window."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window_of(layer)
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.attention_dropout = AttentionDropout(config.attention_dropout)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        config = self.config
        q, k, v = self.project(x)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, k, cos, sin, config.rotary_layout)
        out = self.attend(
            q,
            k,
            v,
            document_ids=document_ids,
            key_mask=key_mask,
            cache=cache,
            window=self.window,
            backend=self.attention_backend,
            **self.attention_dropout.arguments(),
        )
        return self.o_proj(out.flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, E], keys and values [B, T, K, E] of x [B, T, D]."""
        # Three products on purpose: joining the weights for one was measured 1 % slower (llama-34m, CPU, autocast).
        heads = (-1, self.config.head_dim)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


class SwiGLU(nn.Module):
    """The gated feed-forward half: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaBlock(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, document_ids, key_mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaTrunk(nn.Module):
    """Embedding, blocks and final norm: the parameters under `model.` in a checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(Decoder):
    """A decoder-only language model of the llama family."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList | nn.ModuleDict:
        return self.model.layers

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x: Tensor = self.model.embed_tokens(input_ids)
        return x

    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        config = self.config
        # One pair of fp32 tables for all layers; [T, E/2] or [B, T, E/2].
        cos, sin = rotary_tables(config.head_dim, position_ids, config.rope_theta, config.rope_scaling)
        for layer, block in self.blocks.named_children():
            x = block(x, cos, sin, document_ids, key_mask, cache.layers[int(layer)] if cache is not None else None)
        return x
