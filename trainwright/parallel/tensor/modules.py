"""Modules whose parameters are divided: classes that take the place of a module's own, keeping its names and state.

A module changes its class and nothing else, as FSDP2 does it: parameter names, `isinstance`, hooks and compiled blocks
stay valid. Forward passes work on plain tensors, this rank's part of each parameter.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from trainwright.models.adapters.linear import AdaptedLinear
from trainwright.parallel.tensor.adapted import divide_columns, divide_rows, hold_whole
from trainwright.parallel.tensor.collectives import cut_and_gather_gradient, gather_and_cut_gradient
from trainwright.parallel.tensor.parameters import Divider, local, part_of
from trainwright.parallel.tensor.stream import Stream

__all__ = [
    "ColumnLinear",
    "RowLinear",
    "SharedHeadsLinear",
    "VocabularyEmbedding",
    "enter_at",
    "enter_behind",
    "make_column",
    "make_row",
    "make_shared_heads",
    "make_vocabulary",
    "make_whole",
    "positions_of",
]


class ColumnLinear(nn.Linear):
    """A linear of which this rank has some output features.

    enters: its input is the stream's, not yet all tokens. joins: its output has the features of all ranks.
    """

    stream: Stream
    enters: bool
    joins: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.enters:
            input = self.stream.enter(input)
        bias = None if self.bias is None else local(self.bias, Shard(0))
        out = F.linear(input, local(self.weight, Shard(0)), bias)
        return gather_and_cut_gradient(out, self.stream.axis, self.out_features) if self.joins else out


def make_column(
    module: nn.Module, divider: Divider, stream: Stream, *, enters: bool = False, joins: bool = False
) -> None:
    """Divide the output features of a linear."""
    assert isinstance(module, nn.Linear)
    if isinstance(module, AdaptedLinear):
        divide_columns(module, divider, stream, enters=enters, joins=joins)
        return
    divider.shard(module, "weight", 0)
    divider.shard(module, "bias", 0)
    module.__class__ = ColumnLinear
    assert isinstance(module, ColumnLinear)
    module.stream, module.enters, module.joins = stream, enters, joins


class RowLinear(nn.Linear):
    """A linear of which this rank has some input features; the outputs of all are summed, and the bias added once.

    splits: its input has the features of all ranks.
    """

    stream: Stream
    splits: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.splits:
            input = cut_and_gather_gradient(input, self.stream.axis)
        out = self.stream.leave(F.linear(input, local(self.weight, Shard(1))))
        if self.bias is None:
            return out
        bias = local(self.bias, Replicate() if self.stream.always_whole else Partial())
        return out + bias.to(out.dtype)


def make_row(module: nn.Module, divider: Divider, stream: Stream, *, splits: bool = False) -> None:
    """Divide the input features of a linear."""
    assert isinstance(module, nn.Linear)
    if isinstance(module, AdaptedLinear):
        divide_rows(module, divider, stream, splits=splits)
        return
    divider.shard(module, "weight", 1)
    divider.replicate(module, "bias")
    module.__class__ = RowLinear
    assert isinstance(module, RowLinear)
    module.stream, module.splits = stream, splits


class SharedHeadsLinear(nn.Linear):
    """Keys or values of fewer heads than the ranks divide: held whole, and each rank computes what its queries need.

    picks: for each key/value head of the output, its row of heads among those computed; a head appears several times
        where its queries on this rank are more than another's, because attention takes equally large groups.
    """

    rows: slice
    heads: int
    picks: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias, Partial())[self.rows]
        out = F.linear(input, local(self.weight, Partial())[self.rows], bias)
        if len(self.picks) == self.heads:
            return out
        by_head = out.unflatten(-1, (self.heads, -1))
        return torch.stack([by_head[..., pick, :] for pick in self.picks], dim=-2).flatten(-2)


def make_shared_heads(module: nn.Module, divider: Divider, *, queries: int, heads: int) -> int:
    """Let a linear of `heads` key/value heads compute those for this rank's part of the `queries` query heads.

    Returns how many its output has.
    """
    assert isinstance(module, nn.Linear)
    first, count = part_of(queries, divider.axis)
    needed = [query // (queries // heads) for query in range(first, first + count)]
    groups = {head: len(list(group)) for head, group in groupby(needed)}
    each = math.gcd(*groups.values())
    width = module.out_features // heads
    rows = slice(min(groups) * width, (max(groups) + 1) * width)
    picks = tuple(head - min(groups) for head, size in groups.items() for _ in range(size // each))
    if isinstance(module, AdaptedLinear):
        hold_whole(module, divider, rows, len(groups), picks)
        return len(picks)
    divider.replicate(module, "weight")
    divider.replicate(module, "bias")
    module.__class__ = SharedHeadsLinear
    assert isinstance(module, SharedHeadsLinear)
    module.rows, module.heads, module.picks = rows, len(groups), picks
    return len(picks)


class VocabularyEmbedding(nn.Embedding):
    """An embedding of which this rank has some rows; the looked-up rows of all are summed into the stream."""

    stream: Stream

    def forward(self, input: Tensor) -> Tensor:
        self.stream.begin(input.shape[1])
        weight = local(self.weight, Shard(0))
        first, rows = part_of(self.num_embeddings, self.stream.axis)
        own = input - first
        here = (own >= 0) & (own < rows)
        padding = None if self.padding_idx is None or not first <= self.padding_idx < first + rows else self.padding_idx
        found = F.embedding(torch.where(here, own, 0), weight, padding if padding is None else padding - first)
        return self.stream.leave(found * here[..., None].to(found.dtype))


def make_vocabulary(module: nn.Module, divider: Divider, stream: Stream) -> None:
    """Divide the rows of a token embedding."""
    assert isinstance(module, nn.Embedding)
    divider.shard(module, "weight", 0)
    module.__class__ = VocabularyEmbedding
    assert isinstance(module, VocabularyEmbedding)
    module.stream = stream


class _Positions(nn.Embedding):
    """A position embedding for the tokens of the stream that are here."""

    stream: Stream

    def forward(self, input: Tensor) -> Tensor:
        self.stream.begin(input.shape[-1])
        positions = self.stream.own(input, input.dim() - 1)
        return F.embedding(positions, local(self.weight, Partial()), self.padding_idx)


def positions_of(module: nn.Module, divider: Divider, stream: Stream) -> None:
    """Let a position embedding, held whole, look up the positions of this rank's tokens alone."""
    assert isinstance(module, nn.Embedding)
    divider.replicate(module, "weight")
    module.__class__ = _Positions
    assert isinstance(module, _Positions)
    module.stream = stream


class _EntersAt(nn.Module):
    stream: Stream

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.stream.enter(x), *args, **kwargs)


class _EntersBehind(nn.Module):
    stream: Stream

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.stream.enter(super().forward(*args, **kwargs))


_CLASSES: dict[tuple[Any, ...], type[Any]] = {}
"""Made once for each kind of module, so that equal blocks stay of one class and share compiled code."""


def _subclass(kind: type[Any], *bases: type[Any], key: tuple[Any, ...] = (), **body: Any) -> type[Any]:
    """A subclass of `kind` under its name, with `bases` before it."""
    made = (kind, *bases, *key)
    if made not in _CLASSES:
        _CLASSES[made] = type(kind.__name__, (*bases, kind), {"__module__": kind.__module__, **body})
    return _CLASSES[made]


def enter_at(module: nn.Module, stream: Stream) -> None:
    """Give a module all tokens: its first argument is the stream's. Its own linears then need not enter."""
    module.__class__ = _subclass(type(module), _EntersAt)
    assert isinstance(module, _EntersAt)
    module.stream = stream


def enter_behind(module: nn.Module, stream: Stream) -> None:
    """Give whoever follows a module all tokens of its output."""
    module.__class__ = _subclass(type(module), _EntersBehind)
    assert isinstance(module, _EntersBehind)
    module.stream = stream


def make_whole(module: nn.Module, divider: Divider, *, adds: bool) -> None:
    """Hold all of a module's own parameters on each rank; its code reads them as plain tensors.

    adds: each rank's gradient is an addend to the whole (it sees its own tokens or heads); if not, each has all of it.
    """
    names = tuple(name for name, value in module._parameters.items() if value is not None)
    if not names:
        return
    for name in names:
        divider.replicate(module, name)
    gradient: Placement = Partial() if adds else Replicate()
    readers = {name: _reader(name, gradient) for name in names}
    module.__class__ = _subclass(type(module), _ReadsLocal, key=(names, adds), **readers)


class _ReadsLocal(nn.Module):
    """Its parameters read as plain tensors while it computes, and only then: FSDP2 reads attributes as well, and wants
    the parameters themselves."""

    computes = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.computes = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.computes = False


def _reader(name: str, gradient: Placement) -> property:
    def read(self: _ReadsLocal) -> Tensor | None:
        parameter = self._parameters[name]
        return local(parameter, gradient) if parameter is not None and self.computes else parameter

    return property(read)
