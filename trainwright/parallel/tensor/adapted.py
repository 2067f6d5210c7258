"""Linears with adapters on a tensor axis: A and B are divided where the linear's own weight makes it so.

    output features divided   A whole (each rank has an addend of its gradient), B and magnitudes divided
    input features divided    A divided, B and magnitudes whole: B (A x) is linear in A x, so that its addends are
                              summed over the ranks together with those of W x

No message is sent that would not be sent without adapters, but for the row norms of DoRA where rows are divided.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Axis
from trainwright.models.adapters.linear import ADAPTER_LEAVES, NF4_LEAVES, AdaptedLinear
from trainwright.parallel.tensor.collectives import all_reduce, cut_and_gather_gradient, gather_and_cut_gradient
from trainwright.parallel.tensor.parameters import Divider, local, part_of
from trainwright.parallel.tensor.stream import Stream

__all__ = ["ColumnAdapted", "RowAdapted", "SharedHeadsAdapted", "divide_columns", "divide_rows", "hold_whole"]


class _Divided(AdaptedLinear):
    """An adapted linear of which this rank has a part.

    gradients: of each parameter, what this rank's gradient is: a part of it, or an addend to it.
    """

    stream: Stream
    gradients: dict[str, Placement]

    def held(self, name: str) -> Tensor | None:
        parameter = self._parameters.get(name)
        return None if parameter is None else local(parameter, self.gradients[name])


class ColumnAdapted(_Divided):
    """See `ColumnLinear`."""

    enters: bool
    joins: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.enters:
            input = self.stream.enter(input)
        out = self.product(input, self.held("bias"))
        return gather_and_cut_gradient(out, self.stream.axis, self.out_features) if self.joins else out


class RowAdapted(_Divided):
    """See `RowLinear`."""

    splits: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.splits:
            input = cut_and_gather_gradient(input, self.stream.axis)
        out = self.stream.leave(self.product(input, None))
        bias = self.held("bias")
        return out if bias is None else out + bias.to(out.dtype)

    def whole_squares(self, squares: Tensor) -> Tensor:
        return all_reduce(squares, self.stream.axis)


class SharedHeadsAdapted(_Divided):
    """See `SharedHeadsLinear`: everything is whole, and this rank computes some rows of it."""

    rows: slice
    heads: int
    picks: tuple[int, ...]

    def held(self, name: str) -> Tensor | None:
        whole = super().held(name)
        return whole if whole is None or name == "lora_A" else whole[self.rows]

    def forward(self, input: Tensor) -> Tensor:
        out = self.product(input, self.held("bias"))
        if len(self.picks) == self.heads:
            return out
        by_head = out.unflatten(-1, (self.heads, -1))
        return torch.stack([by_head[..., pick, :] for pick in self.picks], dim=-2).flatten(-2)


def divide_columns(
    module: AdaptedLinear, divider: Divider, stream: Stream, *, enters: bool = False, joins: bool = False
) -> None:
    """Divide the output features."""
    for name in (*NF4_LEAVES, "bias", "lora_B", "magnitude"):
        divider.shard(module, name, 0)
    divider.replicate(module, "lora_A")
    module.__class__ = ColumnAdapted
    assert isinstance(module, ColumnAdapted)
    module.stream, module.enters, module.joins = stream, enters, joins
    module.gradients = {**_all(Shard(0)), "lora_A": Partial()}


def divide_rows(module: AdaptedLinear, divider: Divider, stream: Stream, *, splits: bool = False) -> None:
    """Divide the input features.

    Raises:
        ConfigError: a part would end inside a block of a weight in 4 bits.
    """
    if module.weight_scale is not None:
        _refuse_cut_blocks(module, divider.axis)
    for name in ("weight", "weight_scale", "lora_A"):
        divider.shard(module, name, 1)
    for name in ("weight_range", "bias", "lora_B", "magnitude"):
        divider.replicate(module, name)
    module.__class__ = RowAdapted
    assert isinstance(module, RowAdapted)
    module.stream, module.splits = stream, splits
    module.lora_dropout.first_feature = part_of(module.in_features, divider.axis)[0]
    # The bias is added after the sum, where each rank has its own tokens, or all of them.
    bias: Placement = Replicate() if stream.always_whole else Partial()
    module.gradients = {**_all(Partial()), "weight": Shard(1), "weight_scale": Shard(1), "lora_A": Shard(1)}
    module.gradients |= {"bias": bias}


def hold_whole(module: AdaptedLinear, divider: Divider, rows: slice, heads: int, picks: tuple[int, ...]) -> None:
    """Hold everything, and compute some rows of it."""
    for name in (*NF4_LEAVES, "bias", *ADAPTER_LEAVES):
        divider.replicate(module, name)
    module.__class__ = SharedHeadsAdapted
    assert isinstance(module, SharedHeadsAdapted)
    module.rows, module.heads, module.picks = rows, heads, picks
    module.gradients = _all(Partial())


def _all(placement: Placement) -> dict[str, Placement]:
    return dict.fromkeys((*NF4_LEAVES, "bias", *ADAPTER_LEAVES), placement)


def _refuse_cut_blocks(module: AdaptedLinear, axis: Axis) -> None:
    assert isinstance(module.weight_scale, nn.Parameter)
    blocks = module.weight_scale.shape[1]
    if blocks % axis.size or module.in_features % blocks:
        raise ConfigError(
            f"{module.in_features} input features in 4 bits are {blocks} blocks of 64, which {axis.size} tensor ranks"
            " do not divide",
            hint="choose another parallel.tensor, or adapter.base=bf16",
        )
