"""Which attention backend runs, by a short rule, and why, in words that the planner prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainwright.base.errors import ModelError

__all__ = ["BACKENDS", "BackendChoice", "choose_backend"]

BACKENDS = ("reference", "grouped", "blocked", "sdpa", "flex")
# Below this many queries the blocked form has one block only and nothing to skip.
_BLOCKED_FROM = 128
# flex_attention works in tiles of 128 x 128; on shorter rows the mask costs more than it saves.
_FLEX_FROM = 256


@dataclass(frozen=True)
class BackendChoice:
    """A backend of `attention` and the reason it was chosen."""

    name: str
    reason: str


def choose_backend(
    device_type: str,
    *,
    query_length: int,
    key_length: int,
    causal: bool = True,
    documents: bool = False,
    window: int | None = None,
    key_mask: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> BackendChoice:
    """The rule. First match wins.

    1. Fewer queries than keys (decoding with a cache), not on CUDA: grouped, which reads keys and values once.
    2. CPU, causal, from 128 tokens: blocked, which skips what lies above the diagonal and fuses under torch.compile.
    3. CPU, shorter or not causal: grouped.
    4. CUDA, documents or a window inside a row of 256 tokens or more: flex, which skips empty blocks.
    5. Everything else: torch's scaled_dot_product_attention.
    """
    masked = [
        name for name, present in (("documents", documents), ("window", bool(window)), ("padding", key_mask)) if present
    ]
    what = f" with {' and '.join(masked)}" if masked else ""
    if device_type != "cuda" and query_length < key_length:
        return BackendChoice("grouped", f"{query_length} new of {key_length} positions: keys and values are read once")
    if device_type == "cpu":
        if causal and query_length >= _BLOCKED_FROM:
            return BackendChoice(
                "blocked", f"CPU, causal{what}: blocks above the diagonal are skipped, the rest is fused"
            )
        return BackendChoice("grouped", f"CPU, {query_length} tokens{what}: all scores fit the cache")
    if (
        device_type == "cuda"
        and query_length == key_length >= _FLEX_FROM
        and (documents or window)
        and dtype != torch.float64
    ):
        return BackendChoice("flex", f"CUDA{what}: empty blocks are skipped")
    return BackendChoice("sdpa", f"{device_type}{what}: torch's fused kernel")


def check_backend(name: str) -> None:
    """Raise ModelError when no backend is called `name`."""
    if name not in BACKENDS:
        raise ModelError(f"unknown attention backend {name!r}", hint=f"use auto or one of: {', '.join(BACKENDS)}")
