"""Feed-forward halves in pieces of the sequence: their activations are those of one piece at a time.

A feed-forward half treats tokens apart from each other, so it can run over one piece of the sequence after another; in
backward each piece is computed again. What it holds for backward is then its input alone, and what it needs while it
works falls with the number of pieces (the sequence tiling of Arctic Long Sequence Training, arXiv 2506.13996).
Gradients are those of the whole, up to the order in which the pieces' shares of weight gradients are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainwright.base.errors import ConfigError
from trainwright.models import Backbone
from trainwright.models.dropout import Dropout
from trainwright.models.moe.layer import MoE

__all__ = ["apply_chunked_mlp"]


def apply_chunked_mlp(
    model: nn.Module, chunks: int, *, blocks: Sequence[nn.Module] | None = None, name: str = "mlp"
) -> nn.Module:
    """Let the feed-forward half of every block work on `chunks` pieces of the sequence, one after another; in place.

    Call it after tensor parallelism and before `apply_recompute`, `block.compile()` and `fully_shard`. Layers of
    experts are left as they are: they choose experts and count their load over all tokens of a batch. chunks=1 changes
    nothing.

    Args:
        blocks: the modules to treat; default `model.blocks` of a native decoder.
        name: what the half is called inside a block; it takes and gives [B, T, D].

    Raises:
        ConfigError: fewer than one piece, blocks unknown or without such a module, treated already, or experts only.
    """
    if chunks < 1:
        raise ConfigError(f"memory.mlp_chunks is {chunks}, expected at least 1")
    if chunks == 1:
        return model
    if blocks is None:
        if not isinstance(model, Backbone):
            raise ConfigError(
                f"which modules of {type(model).__name__} are its repeated blocks is not known",
                hint="pass blocks=[...], for example those that find_blocks gives",
            )
        blocks = list(model.blocks.children())
    halves = [_half(block, name) for block in blocks]
    pointwise = [half for half in halves if not isinstance(half, MoE)]
    if halves and not pointwise:
        raise ConfigError(
            "all feed-forward halves are layers of experts, which are not computed in pieces",
            hint="set memory.mlp_chunks=1; parallel.expert divides experts",
        )
    for half in pointwise:
        half.forward = _Chunked(half, chunks).forward
    return model


def _half(block: nn.Module, name: str) -> nn.Module:
    half = getattr(block, name, None)
    if not isinstance(half, nn.Module):
        raise ConfigError(
            f"{type(block).__name__} has no module {name!r} to compute in pieces", hint="set memory.mlp_chunks=1"
        )
    if isinstance(getattr(half.__dict__.get("forward"), "__self__", None), _Chunked):
        raise ConfigError(f"{type(half).__name__} is computed in pieces already")
    return half


class _Chunked:
    """Stands behind the `forward` of one feed-forward half. Not a module: it must not show in names."""

    def __init__(self, half: nn.Module, chunks: int) -> None:
        self.half = half
        self.chunks = chunks
        self.own_forward: Callable[..., Tensor] | None = half.__dict__.get("forward")

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(self.chunks, dim=1)
        if len(pieces) == 1:
            return self._whole(x)
        begin, done = 0, []
        for piece in pieces:
            run = _Piece(self, self._dropout_tokens(x, begin, piece.shape[1]))
            if torch.is_grad_enabled():
                done.append(checkpoint(run, piece, use_reentrant=False))
            else:
                done.append(run(piece))
            begin += piece.shape[1]
        return torch.cat(done, dim=1)

    def _whole(self, x: Tensor) -> Tensor:
        out: Tensor = self.own_forward(x) if self.own_forward is not None else type(self.half).forward(self.half, x)
        return out

    def _dropout_tokens(self, x: Tensor, begin: int, count: int) -> Callable[[], AbstractContextManager[Any]]:
        """A context in which the half's dropouts see the tokens of one piece, in backward too."""
        places = (m.place for m in self.half.modules() if isinstance(m, Dropout) and m.p > 0.0 and m.training)
        place = next((place for place in places if place is not None), None)
        if place is None or place.token_keys is None:
            return contextlib.nullcontext
        keys = place.part(place.token_keys, x.shape[1])[:, begin : begin + count]
        before = (place.positions, keys)
        return lambda: place.as_it_was(before)


class _Piece:
    """The half applied to one piece."""

    def __init__(self, chunked: _Chunked, tokens: Callable[[], AbstractContextManager[Any]]) -> None:
        self.chunked = chunked
        self.tokens = tokens

    def __call__(self, piece: Tensor) -> Tensor:
        with self.tokens():
            return self.chunked._whole(piece)
