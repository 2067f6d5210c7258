"""What every decoder-only family offers to the trainer and the generator, whatever its blocks are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.models.attention import SelfAttention
from trainwright.models.cache import KVCache
from trainwright.models.dropout import DropoutPlace, join_place
from trainwright.ops.attention.choose import check_backend
from trainwright.ops.linear_cross_entropy import LossSums, linear_cross_entropy

__all__ = ["Decoder"]


class Decoder(nn.Module, ABC):
    """A causal language model: token ids in, next-token logits out."""

    config: Any
    lm_head: nn.Linear

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | nn.ModuleDict:
        """The repeated layers, in order; each may be compiled, checkpointed or sharded on its own.

        Where other processes hold some of them, a ModuleDict of the ones that are here, by their number.
        """

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The token embedding [V, D]."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block; worth compiling with them."""

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """What the first block gets, [B, T, D], of input_ids [B, T] at position_ids [T] or [B, T]."""

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

    def check_positions(self, last: int) -> None:
        """Refuse a sequence of so many positions (a ModelError) where the family has learned fewer."""

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """The trunk's output after the final norm, [B, T, D]; see `forward` for the arguments."""
        past = cache.length if cache is not None else 0
        if position_ids is None:
            last = past + input_ids.shape[1]
            self.check_positions(last)
            position_ids = torch.arange(past, last, device=input_ids.device)
        self.dropout_place.locate(position_ids, document_ids)
        x = self.run_blocks(self.embed(input_ids, position_ids), position_ids, document_ids, key_mask, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        normed: Tensor = self.final_norm(x)
        return normed

    def head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> LossSums:
        """Loss sums of the head's logits for hidden [N, D] against labels [N], without holding all logits.

        See `linear_cross_entropy`; who divides the vocabulary over processes puts another function here.
        """
        return linear_cross_entropy(
            hidden, self.head_weight, labels, label_smoothing=label_smoothing, z_loss=z_loss, compiled=compiled
        )

    def auxiliary_loss(self, labels: Tensor) -> Tensor | None:
        """What the latest forward pass in training adds to the loss sum over the trained tokens of labels [B, T].

        Of the blocks that are here; given once for each forward pass. None where a family adds nothing.
        """
        return None

    def take_loads(self) -> Tensor | None:
        """What this process's tokens asked of the model's experts since the last call; integers on the device, to be
        added up over all processes with other tokens and given to `update_balance`. None where no experts are."""
        return None

    def update_balance(self, loads: Tensor) -> None:
        """End an optimizer step with the loads of all processes."""

    def load_statistics(self) -> dict[str, float]:
        """The latest step's loads as numbers for a log, given up when read; waits for the device."""
        return {}

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, D], so that a loss can be computed without holding all logits."""
        return self.lm_head.weight

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
        cached or new, is a real token.
        """
        hidden = self.hidden_states(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache, key_mask=key_mask
        )
        logits: Tensor = self.lm_head(hidden)
        return logits

    @property
    def dropout_place(self) -> DropoutPlace:
        """Which tokens the dropouts of this model see; for `set_dropout` and for who divides sequences."""
        place: DropoutPlace = self.__dict__.setdefault("_dropout_place", DropoutPlace())
        return place

    def set_dropout(self, *, seed: int | None, rows: Tensor | None) -> None:
        """What the coming forward pass drops: a pure function of the step's seed, the global numbers of its rows [B],
        documents and positions, whatever the layout. None for both goes back to torch's generator."""
        if rows is None or join_place(self, self.dropout_place, rows.device):
            self.dropout_place.set(seed, rows)

    def set_attention_backend(self, name: str) -> None:
        """Use one backend of `ops.attention.BACKENDS`, or "auto", wherever no cache is.

        Raises:
            ModelError: no backend is called that.
        """
        if name != "auto":
            check_backend(name)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.attention_backend = name

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the configuration says so. Call again after replacing either.

        Nothing where another process holds one of them.
        """
        if self.config.tie_embeddings and self.lm_head is not None and self.embedding is not None:
            self.lm_head.weight = self.embedding.weight

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
