"""The bert family: learned positions and kinds of tokens, full bidirectional attention, LayerNorm after each half.

Parameter names are those of transformers' BERT, but for the language-model head, which has RoBERTa's; `weights.py`
turns them at the border. Shapes: B batch, T tokens, D hidden, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.attention import SelfAttention
from trainwright.models.bert.config import BertConfig
from trainwright.models.dropout import AttentionDropout, Dropout
from trainwright.models.encoder import Encoder, MaskedHead
from trainwright.models.gpt2.model import LayerNorm
from trainwright.ops.activation import activation

__all__ = ["BertBlock", "BertForMaskedLM", "BertSelfAttention"]


def _norm(config: BertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.layer_norm_eps, bias=True)


class BertEmbeddings(nn.Module):
    """norm(word + position + kind of token), then dropout. Where there is one kind (RoBERTa), every token is of it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        positions = config.max_position_embeddings + config.position_offset
        self.offset = config.position_offset
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = _norm(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if token_type_ids is None or self.token_type_embeddings.num_embeddings == 1:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids + self.offset)
        out: Tensor = self.dropout(self.LayerNorm(x + self.token_type_embeddings(token_type_ids)))
        return out


class BertSelfAttention(SelfAttention):
    """Multi-head attention over the whole text, up to its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = AttentionDropout(config.attention_dropout)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        out = self.attend(
            self.query(x).unflatten(-1, heads),
            self.key(x).unflatten(-1, heads),
            self.value(x).unflatten(-1, heads),
            document_ids=document_ids,
            key_mask=key_mask,
            cache=None,
            backend=self.attention_backend,
            causal=False,
            **self.dropout.arguments(),
        )
        return out.flatten(-2)


class BertOutput(nn.Module):
    """The end of a half: norm(residual + dropout(dense(x)))."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = _norm(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class BertAttention(nn.Module):
    """The attention half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.output(self.self(x, document_ids, key_mask), x)
        return out


class BertIntermediate(nn.Module):
    """The wide half of the feed-forward: activation(dense(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class BertBlock(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        x = self.attention(x, document_ids, key_mask)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class BertEncoder(nn.Module):
    """The blocks."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertBlock(config) for _ in range(config.num_layers))


class BertTrunk(nn.Module):
    """Embeddings and blocks: the parameters under `bert.` in a checkpoint. There is no norm after the last block, whose
    halves end with one; `end` stands where other families have it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.end = nn.Identity()


class BertMaskedHead(MaskedHead):
    """The head of masked language modelling."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # RoBERTa's head has the exact GELU whatever the blocks have.
        self.activation = activation(config.activation if config.architecture == "bert" else "gelu")
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = _norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def transform(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer_norm(self.activation(self.dense(x)))
        return out


class BertForMaskedLM(Encoder):
    """An encoder of the bert family."""

    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertTrunk(config)
        self.lm_head = BertMaskedHead(config)
        self.tie_weights()

    @property
    def blocks(self) -> nn.ModuleList | nn.ModuleDict:
        return self.bert.encoder.layer

    @property
    def embedding(self) -> nn.Embedding:
        # None where the first part of a pipeline, which has the embeddings, is on another process.
        embeddings: BertEmbeddings | None = self.bert.embeddings
        return None if embeddings is None else embeddings.word_embeddings  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module:
        return self.bert.end

    def check_positions(self, last: int) -> None:
        if last > self.config.max_position_embeddings:
            raise ModelError(
                f"{last} positions, but this model has learned {self.config.max_position_embeddings}",
                hint="shorten the sequence; learned positions cannot be extended",
            )

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x: Tensor = self.bert.embeddings(input_ids, position_ids, token_type_ids)
        return x

    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        for block in self.blocks.children():
            x = block(x, document_ids, key_mask)
        return x
