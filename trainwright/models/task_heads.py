"""The heads of tasks as modules: hidden states and a batch in, scores in fp32 out.

B batch, T tokens, D width of the trunk, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.models.crf import LinearChainCRF
from trainwright.models.dropout import Dropout, RowDropout

__all__ = ["DenseHead", "EmbeddingHead", "RowHead", "TokenHead", "entity_vectors", "pool", "real_tokens"]

Batch = Mapping[str, Tensor]


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, bool [B, T], by `key_mask` or `lengths` (never by a token's id); None: all."""
    mask = batch.get("key_mask")
    if mask is not None:
        return mask
    lengths = batch.get("lengths")
    if lengths is None:
        return None
    return torch.arange(batch["input_ids"].shape[1], device=lengths.device)[None] < lengths[:, None]


def pool(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """One vector [B, D] for each row of hidden [B, T, D]: the "first" token's, the "last" real token's, or their mean.

    Raises:
        ModelError: a row holds several texts (`document_ids`).
    """
    if batch.get("document_ids") is not None:
        raise ModelError(
            "rows of several texts have no vector of their own", hint="train this task without packing (data.packing)"
        )
    if pooling == "first":
        return hidden[:, 0]
    mask = real_tokens(batch)
    if pooling == "mean":
        if mask is None:
            return hidden.mean(1)
        weights = mask.to(torch.promote_types(hidden.dtype, torch.float32))
        total = (hidden * weights[..., None]).sum(1)
        return total / weights.sum(1, keepdim=True).clamp(min=1)
    if mask is None:
        return hidden[:, -1]
    order = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, order, 0).amax(1)
    return _at(hidden, last[:, None])[:, 0]


def entity_vectors(hidden: Tensor, batch: Batch) -> Tensor:
    """The vectors of the two markers' first tokens beside each other, [B, 2 D] (Baldini Soares et al. 2019, arXiv
    1906.03158).

    Raises:
        ModelError: the batch has no `entity_starts` [B, 2].
    """
    starts = batch.get("entity_starts")
    if starts is None or starts.dim() != 2 or starts.shape[1] != 2:
        seen = None if starts is None else list(starts.shape)
        raise ModelError(f"a head of entities needs `entity_starts` [B, 2] in the batch, seen {seen}")
    return _at(hidden, starts.clamp(min=0)).flatten(1)


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """hidden [B, T, D] at places [B, P]: [B, P, D]."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class RowHead(nn.Linear):
    """Scores [B, L] of the pooled vector."""

    def __init__(self, width: int, labels: int, *, pooling: str, dropout: float, bias: bool) -> None:
        super().__init__(width, labels, bias=bias)
        self.pooling = pooling
        self.dropout = RowDropout(dropout)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        return _wide(super().forward(self.dropout(pool(hidden, batch, self.pooling))))


class TokenHead(nn.Linear):
    """Scores [B, T, L] of every token; `crf` scores transitions between them, where it is not None."""

    def __init__(self, width: int, labels: int, *, dropout: float, crf: bool = False) -> None:
        super().__init__(width, labels)
        self.dropout = Dropout(dropout)
        self.crf = LinearChainCRF(labels) if crf else None

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        return _wide(super().forward(self.dropout(hidden)))


class DenseHead(nn.Module):
    """Scores [B, L] through a dense layer with tanh: of the pooled vector, or (pooling None) of two entities.

    dropout_in: dropout in front of the dense layer too, as RoBERTa has it.
    """

    def __init__(self, width: int, labels: int, *, pooling: str | None, dropout: float, dropout_in: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.dropout_in = RowDropout(dropout if dropout_in else 0.0)
        self.dense = nn.Linear(width if pooling is not None else 2 * width, width)
        self.dropout = RowDropout(dropout)
        self.out_proj = nn.Linear(width, labels)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        x = entity_vectors(hidden, batch) if self.pooling is None else pool(hidden, batch, self.pooling)
        x = torch.tanh(self.dense(self.dropout_in(x)))
        return _wide(self.out_proj(self.dropout(x)))


class EmbeddingHead(nn.Module):
    """A vector [B, D] of length 1 for each row; no parameters."""

    def __init__(self, *, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        return F.normalize(_wide(pool(hidden, batch, self.pooling)), dim=-1)
