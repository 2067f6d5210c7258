"""Keys and values of the tokens seen so far, so that generating one more token costs one token of compute.

All memory is taken at the start. A layer that sees everything holds `capacity` tokens; a layer with a sliding window
holds twice its window and, when full, moves the window to the front: one move of W tokens every W steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainwright.base.errors import ModelError

__all__ = ["KVCache", "LayerCache"]


class LayerCache:
    """Keys and values of one layer, the newest token last.

    Stored as [batch, kv_heads, slots, head_dim], so that decoding multiplies them in place; handed out as views
    [batch, tokens, kv_heads, head_dim], as attention expects them.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self.keys = keys
        self.values = values
        self.window = window
        self.used = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, T, Hkv, D] and return everything these T queries may need, oldest first.

        Raises:
            ModelError: the tokens do not fit into the capacity that the cache was made with.
        """
        count, slots = k.shape[1], self.keys.shape[2]
        if self.window is not None and self.used + count > slots:
            return self._slide(k, v)
        if self.used + count > slots:
            raise ModelError(
                f"the key/value cache holds {slots} tokens; {self.used} are used and {count} more arrived",
                hint="make the cache with a larger capacity",
            )
        end = self.used + count
        self.keys[:, :, self.used : end] = k.transpose(1, 2)
        self.values[:, :, self.used : end] = v.transpose(1, 2)
        self.used = end
        return self.keys[:, :, :end].transpose(1, 2), self.values[:, :, :end].transpose(1, 2)

    def _slide(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert self.window is not None
        first = max(0, self.used - (self.window - 1))
        all_keys = torch.cat((self.keys[:, :, first : self.used], k.transpose(1, 2).to(self.keys.dtype)), dim=2)
        all_values = torch.cat((self.values[:, :, first : self.used], v.transpose(1, 2).to(self.values.dtype)), dim=2)
        kept = min(all_keys.shape[2], self.window)
        self.keys[:, :, :kept] = all_keys[:, :, -kept:]
        self.values[:, :, :kept] = all_values[:, :, -kept:]
        self.used = kept
        return all_keys.transpose(1, 2), all_values.transpose(1, 2)


class KVCache:
    """The caches of all layers of one batch.

    Args:
        windows: per layer, the sliding window in tokens or None.
        batch, capacity: rows, and tokens per row (prompt with padding plus new tokens).
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers: list[LayerCache] = []
        for window in windows:
            slots = capacity if window is None else min(capacity, 2 * window)
            shape = (batch, num_kv_heads, slots, head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            self.layers.append(LayerCache(keys, torch.zeros_like(keys), window if slots < capacity else None))

    def advance(self, count: int) -> None:
        """Called by the model after a forward over `count` tokens: the next position is that much further."""
        self.length += count

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows (an index tensor), when the others have finished."""
        for layer in self.layers:
            layer.keys = layer.keys[rows]
            layer.values = layer.values[rows]

    @property
    def bytes(self) -> int:
        """Memory taken, in bytes."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)
