"""The gpt2 family: learned positions, LayerNorm before each half, full attention, a plain feed-forward.

Parameter names are those of transformers; linears are stored [out, in] as in torch, where the Hugging Face file has
them transposed (Conv1D), and the fused projection head by head: `weights.py` turns them at the border. Shapes: B batch,
T tokens, D hidden, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.attention import SelfAttention
from trainwright.models.cache import KVCache, LayerCache
from trainwright.models.decoder import Decoder
from trainwright.models.dropout import AttentionDropout, Dropout
from trainwright.models.gpt2.config import GPT2Config
from trainwright.ops.activation import activation
from trainwright.ops.norm import layer_norm

__all__ = ["GPT2Attention", "GPT2Block", "GPT2LMHeadModel", "LayerNorm"]


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension; the bias is optional."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class GPT2Attention(SelfAttention):
    """Multi-head attention; queries, keys and values come from one linear.

    Its output features are [head, (q, k, v), head_dim], so that a contiguous cut divides heads.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.attention_scale(layer)
        self.attn_dropout = AttentionDropout(config.attn_dropout)
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.resid_dropout = Dropout(config.resid_dropout)

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        out = self.attend(
            q,
            k,
            v,
            document_ids=document_ids,
            key_mask=key_mask,
            cache=cache,
            scale=self.scale,
            backend=self.attention_backend,
            **self.attn_dropout.arguments(),
        )
        return self.resid_dropout(self.c_proj(out.flatten(-2)))


class GPT2MLP(nn.Module):
    """The feed-forward half: project(activation(expand(x)))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.activation = activation(config.activation)
        self.dropout = Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class GPT2Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_eps, config.bias)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_eps, config.bias)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), document_ids, key_mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Trunk(nn.Module):
    """Embeddings, blocks and final norm: the parameters under `transformer.` in a checkpoint."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = Dropout(config.embd_dropout)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_eps, config.bias)


class GPT2LMHeadModel(Decoder):
    """A decoder-only language model of the gpt2 family."""

    config: GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList | nn.ModuleDict:
        return self.transformer.h

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.wte

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer.ln_f

    def check_positions(self, last: int) -> None:
        if last > self.config.max_position_embeddings:
            raise ModelError(
                f"{last} positions, but this model has learned {self.config.max_position_embeddings}",
                hint="shorten the sequence; learned positions cannot be extended",
            )

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        trunk = self.transformer
        x: Tensor = trunk.drop(trunk.wte(input_ids) + trunk.wpe(position_ids))
        return x

    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        for layer, block in self.blocks.named_children():
            x = block(x, document_ids, key_mask, cache.layers[int(layer)] if cache is not None else None)
        return x
