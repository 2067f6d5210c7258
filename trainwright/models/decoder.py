"""What every decoder-only family offers to the trainer and the generator, whatever its blocks are."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from trainwright.models.backbone import Backbone
from trainwright.models.cache import KVCache

__all__ = ["Decoder"]


class Decoder(Backbone):
    """A causal language model: token ids in, next-token logits out."""

    lm_head: nn.Linear

    @abstractmethod
    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [B, T, D] through the blocks that this module holds, in order; does not advance the cache."""

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        key_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """The trunk's output after the final norm, [B, T, D]; see `forward` for the arguments."""
        past = cache.length if cache is not None else 0
        position_ids = self.positions_of(input_ids, position_ids, past)
        self.dropout_place.locate(position_ids, document_ids)
        x = self.embed(input_ids, position_ids, token_type_ids)
        x = self.run_blocks(x, position_ids, document_ids, key_mask, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        normed: Tensor = self.final_norm(x)
        return normed

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T].

        position_ids [B, T]: default counts on from what the cache holds. document_ids [B, T]: a token attends only
        inside its own document (packed rows). cache: appended to, then attended to. key_mask [B, S]: True where a key,
        cached or new, is a real token. ModelError where the head of a task stands in place of the language-model head.
        """
        hidden = self.hidden_states(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache, key_mask=key_mask
        )
        return self.logits(hidden)

    @property
    def cache_heads(self) -> int:
        """Key/value heads of a layer's cache."""
        heads: int = self.config.num_kv_heads
        return heads

    def make_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty key/value cache for `batch` rows of up to `capacity` tokens, on the model's device.

        dtype: default is what attention computes in, the autocast dtype where autocast is on.
        """
        device = self.embedding.weight.device
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        dtype = dtype or self.embedding.weight.dtype
        return KVCache(
            self.config.layer_windows(),
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.cache_heads,
            head_dim=self.config.head_dim,
            dtype=dtype,
            device=device,
        )
