"""Ring attention: keys and values travel around the ranks of a ring while each computes with those it has.

Liu et al., arXiv 2310.01889. Forward: each rank's keys and values make n - 1 hops. Backward: they make n - 1 hops
again, and behind them their gradients, which every rank they pass adds its share to; the share of the rank that they
belong to never leaves it, so gradients make n - 1 hops too. Gradients travel as the fp32 sums that they are: nothing is
rounded between additions.

In a compiled block forward and backward are two operators that the compiler does not look into.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trainwright.ops.attention import DroppedWeights, attention_part, attention_part_backward, merge_parts
from trainwright.ops.dropout import head_keys
from trainwright.parallel.context.exchange import ContextGroup, Hop

__all__ = ["Masking", "Ring", "ring_attention"]


class Masking(NamedTuple):
    """What decides on attention weights beside queries and keys. [B, all T] are those of the whole ring, by rank.

    documents: int [B, all T], or None. window, scale: as in `attention_part`.
    dropout: the probability of dropping a weight; above zero with keys, int64 [B, T] of this rank's tokens, places,
        int [B or 1, all T] of all tokens, and the number of the first head here.
    """

    documents: Tensor | None
    window: int | None
    scale: float
    keys: Tensor | None = None
    places: Tensor | None = None
    dropout: float = 0.0
    first_head: int = 0


class Ring:
    """The passes of ring attention over a group; what `ring_attention` is given.

    Args:
        compiled: fuse the steps between products.
    """

    _named: ClassVar[weakref.WeakValueDictionary[str, Ring]] = weakref.WeakValueDictionary()
    _made: ClassVar[int] = 0

    def __init__(self, group: ContextGroup, compiled: bool = False) -> None:
        self.group = group
        self.compiled = compiled
        Ring._made += 1
        # Operators take tensors, numbers and words: the compiled graph knows a ring by its name.
        self.name = f"ring {Ring._made}"
        Ring._named[self.name] = self

    @classmethod
    def named(cls, name: str) -> Ring:
        return cls._named[name]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """out [B, T, Hq, D] in the dtype of q and lse [B, Hq, T] over the keys of all ring ranks."""
        out: Tensor | None = None
        lse: Tensor | None = None
        # Heads first, as the blocks of attention want them; q, k and v are turned once, not on every hop.
        q, pair = _turned(q), torch.stack((k.transpose(1, 2), v.transpose(1, 2)))
        for hop, options in enumerate(self._hops(q, masking)):
            coming = self._pass_on(pair, hop)
            keys, values = pair.transpose(2, 3).unbind()
            part = attention_part(q, keys, values, **options)
            out, lse = part if out is None or lse is None else merge_parts(out, lse, *part)
            pair = pair if coming is None else coming.arrive()
        assert out is not None
        assert lse is not None
        return out.to(q.dtype), lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masking: Masking
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in their shapes and dtypes."""
        q, grad_out = _turned(q), _turned(grad_out)
        pair = torch.stack((k.transpose(1, 2), v.transpose(1, 2)))
        grad_q: Tensor | None = None
        own: Tensor | None = None
        behind: Hop | None = None  # gradients of the keys of this hop, with the shares of the ranks before
        for hop, options in enumerate(self._hops(q, masking)):
            coming = self._pass_on(pair, hop)
            keys, values = pair.transpose(2, 3).unbind()
            share_q, share_k, share_v = attention_part_backward(grad_out, q, keys, values, out, lse, **options)
            shares = torch.stack((share_k.transpose(1, 2), share_v.transpose(1, 2)))
            if grad_q is None or own is None:
                grad_q, own = share_q, shares
            else:
                grad_q += share_q
                if behind is not None:
                    shares += behind.arrive()
                behind = self.group.pass_on(shares, "ring_gradients")
            pair = pair if coming is None else coming.arrive()
        assert grad_q is not None
        assert own is not None
        if behind is not None:
            own += behind.arrive()
        grad_k, grad_v = own.transpose(2, 3).unbind()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _pass_on(self, pair: Tensor, hop: int) -> Hop | None:
        return self.group.pass_on(pair, "ring") if hop + 1 < self.group.order.ring else None

    def _hops(self, q: Tensor, masking: Masking) -> Iterator[dict[str, Any]]:
        """For each hop, what `attention_part` has to know of the keys that are here then."""
        order, held, mine = self.group.order, q.shape[1], self.group.ring_rank
        heads = None if masking.keys is None else head_keys(masking.keys, q.shape[2], masking.first_head)
        for hop in range(order.ring):
            theirs = (mine - hop) % order.ring
            at_home, there = (slice(rank * held, (rank + 1) * held) for rank in (mine, theirs))
            options: dict[str, Any] = {
                "q_positions": order.ring_positions(mine, held * order.ring),
                "k_positions": order.ring_positions(theirs, held * order.ring),
                "window": masking.window,
                "scale": masking.scale,
                "compiled": self.compiled,
            }
            if masking.documents is not None:
                options["q_documents"] = masking.documents[:, at_home]
                options["k_documents"] = masking.documents[:, there]
            if heads is not None and masking.places is not None:
                options["dropped"] = DroppedWeights(masking.dropout, heads, masking.places[:, there])
            yield options


def ring_attention(ring: Ring, q: Tensor, k: Tensor, v: Tensor, masking: Masking) -> Tensor:
    """Causal attention of this ring rank's q [B, T, Hq, D] over the k, v [B, T, Hkv, D] of all, in zig-zag order.

    Gives [B, T, Hq, D] in the dtype of q.
    """
    autocast_off = torch.autocast(q.device.type, enabled=False) if q.device.type != "meta" else nullcontext()
    with autocast_off:
        if torch.compiler.is_compiling():
            out: Tensor = _ring_operator(q, k, v, ring.name, *masking)[0]
        else:
            out = _RingAttention.apply(q, k, v, ring, masking)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, masking: Masking) -> Tensor:
        out, lse = ring.forward(q, k, v, masking)
        ctx.save_for_backward(q, k, v, out, lse, masking.documents, masking.keys, masking.places)
        ctx.ring, ctx.masking = ring, masking._replace(documents=None, keys=None, places=None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, documents, keys, places = ctx.saved_tensors
        masking = ctx.masking._replace(documents=documents, keys=keys, places=places)
        return (*ctx.ring.backward(grad_out, *tensors, masking), None, None)


@torch.library.custom_op("trainwright::ring_attention", mutates_args=())
def _ring_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: str,
    documents: Tensor | None,
    window: int | None,
    scale: float,
    keys: Tensor | None,
    places: Tensor | None,
    dropout: float,
    first_head: int,
) -> tuple[Tensor, Tensor]:
    masking = Masking(documents, window, scale, keys, places, dropout, first_head)
    out, lse = Ring.named(ring).forward(q, k, v, masking)
    return out.contiguous(), lse


@_ring_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ring: str, *masking: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


@torch.library.custom_op("trainwright::ring_attention_backward", mutates_args=())
def _ring_backward_operator(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ring: str,
    documents: Tensor | None,
    window: int | None,
    scale: float,
    keys: Tensor | None,
    places: Tensor | None,
    dropout: float,
    first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    masking = Masking(documents, window, scale, keys, places, dropout, first_head)
    grad_q, grad_k, grad_v = Ring.named(ring).backward(grad_out, q, k, v, out, lse, masking)
    # Those of keys and values are views of one tensor, and results of an operator must not share memory.
    plain = torch.contiguous_format
    return grad_q.contiguous(), grad_k.clone(memory_format=plain), grad_v.clone(memory_format=plain)


@_ring_backward_operator.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.ring, documents, ctx.window, ctx.scale, keys, places, ctx.dropout, ctx.first_head = inputs
    ctx.save_for_backward(q, k, v, *output, documents, keys, places)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, documents, keys, places = ctx.saved_tensors
    masking = Masking(documents, ctx.window, ctx.scale, keys, places, ctx.dropout, ctx.first_head)
    return (*_ring_backward_operator(grad_out, *tensors, ctx.ring, *masking), *[None] * 8)


_ring_operator.register_autograd(_backward, setup_context=_save)


def _turned(x: Tensor) -> Tensor:
    """The same [B, T, H, D], lying in memory as [B, H, T, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
