"""A linear with a low-rank addition: y = W x + s B A x, where only A and B are trained.

The module changes its class and gets parameters beside its own, whose names stay: pretrained weights, plans of tensor
parallelism, checkpoints and exports go on working. Who divides parameters over ranks derives from `AdaptedLinear` and
says by `held` and `whole_squares` what a rank has of them.

Shapes: r rank, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.models.adapters.nf4 import NF4, dequantise
from trainwright.models.dropout import Dropout

__all__ = ["ADAPTER_LEAVES", "NF4_LEAVES", "AdaptedLinear", "held_types", "row_norms"]

ADAPTER_LEAVES = ("lora_A", "lora_B", "magnitude")
"""Trained parameters of an adapted linear."""

NF4_LEAVES = ("weight", "weight_scale", "weight_range")
"""Parameters that hold a weight in 4 bits: the fields of `NF4`."""

ROWS_AT_A_TIME = 1 << 22
"""Numbers of a weight whose norms are taken at a time, in fp32."""


class AdaptedLinear(nn.Linear):
    """A linear whose weight is frozen, with a low-rank addition that is trained.

    Attributes:
        lora_A, lora_B: [r, I] and [O, r].
        magnitude: [O], of DoRA: the length that each row of W + s B A is given; else None.
        scaling: s.
        weight: [O, I]; in 4 bits it is the codes [O, I / 2], and `weight_scale` and `weight_range` are its magnitudes.
        lora_dropout: of the adapter's input. (In peft's DoRA the base's input is dropped as well; not so here.)
        keeps_type: whether the weight keeps its type when the model is cast.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    weight_scale: nn.Parameter | None
    weight_range: nn.Parameter | None
    scaling: float
    lora_dropout: Dropout
    keeps_type: bool

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.held("bias"))

    def held(self, name: str) -> Tensor | None:
        """What is here of a parameter, as a plain tensor; None where there is no such parameter."""
        value: Tensor | None = getattr(self, name)
        return value

    def whole_squares(self, squares: Tensor) -> Tensor:
        """The squared norms [O] of whole rows, from those of what is here of them."""
        return squares

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + s B A x (DoRA: its rows given their lengths), and the bias if it is to be added here."""
        a, b, magnitude = self.held("lora_A"), self.held("lora_B"), self.held("magnitude")
        assert a is not None
        assert b is not None
        addition = F.linear(F.linear(self.lora_dropout(x), as_multiplied(a, x)), as_multiplied(b, x))
        if magnitude is None:
            return torch.add(self.base_product(x, bias), addition, alpha=self.scaling)
        # The norm is a constant of the backward pass, as in section 4.3 of the DoRA paper.
        lengths = magnitude / row_norms(self.weight_rows, a, b, self.scaling, self.whole_squares)
        out = torch.add(self.base_product(x, None), addition, alpha=self.scaling)
        out = out * lengths.to(out.dtype)
        return out if bias is None else out + bias.to(out.dtype)

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias of the frozen weight."""
        weight, scale, range_ = (self.held(name) for name in NF4_LEAVES)
        assert weight is not None
        dtype = multiplied_type(x)
        if scale is None and (weight.dtype == dtype or weight.dtype == x.dtype or weight.requires_grad):
            return F.linear(x, as_multiplied(weight, x), None if bias is None else as_multiplied(bias, x))
        out: Tensor = _FrozenProduct.apply(x, weight, scale, range_, dtype)
        return out if bias is None else out + bias.to(out.dtype)

    def weight_rows(self, begin: int, stop: int) -> Tensor:
        """Rows of what is here of the weight, in fp32."""
        weight, scale, range_ = (self.held(name) for name in NF4_LEAVES)
        assert weight is not None
        if scale is None:
            return weight[begin:stop].float()
        assert range_ is not None
        return dequantise(NF4(weight[begin:stop], scale[begin:stop], range_[begin:stop]), torch.float32)

    def extra_repr(self) -> str:
        kind = "dora" if self.magnitude is not None else "lora"
        base = ", nf4" if self.weight_scale is not None else ""
        return f"{super().extra_repr()}, {kind} rank={self.lora_A.shape[0]}{base}"


def held_types(module: AdaptedLinear) -> tuple[str, ...]:
    """Names of parameters that keep their type when the model is cast."""
    return NF4_LEAVES if module.keeps_type or module.weight_scale is not None else ()


def multiplied_type(x: Tensor) -> torch.dtype:
    """The type in which a product with x is computed: autocast's, or that of x."""
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def as_multiplied(weight: Tensor, x: Tensor) -> Tensor:
    """A weight that can be multiplied with x: of its type where no autocast casts both."""
    if weight.dtype == x.dtype or multiplied_type(x) != x.dtype:
        return weight
    return weight.to(x.dtype)


@torch.no_grad()
def row_norms(rows: Any, a: Tensor | None, b: Tensor | None, scaling: float, whole_squares: Any = None) -> Tensor:
    """Lengths [O] of the rows of W + s B A, in fp32; some rows of W are unpacked at a time.

    A row of zeros has the smallest length above zero, so that it can be divided by (0 / 0 would be no number).

    Args:
        rows: (begin, stop) -> these rows of W [.., I] in fp32, beyond the last one none.
        a, b: None for those of W itself.
        whole_squares: see `AdaptedLinear.whole_squares`.
    """
    squares, begin = [], 0
    first = rows(0, 1)
    count = None if b is None else b.shape[0]
    step = max(1, ROWS_AT_A_TIME // max(1, first.shape[1]))
    with torch.autocast(first.device.type, enabled=False):
        while count is None or begin < count:
            part = rows(begin, begin + step if count is None else min(begin + step, count))
            if not len(part):
                break
            if a is not None and b is not None:
                part = torch.addmm(part, b[begin : begin + len(part)].float(), a.float(), alpha=scaling)
            squares.append(part.square().sum(1))
            begin += len(part)
    total = torch.cat(squares) if squares else first.new_zeros(0)
    lengths: Tensor = (total if whole_squares is None else whole_squares(total)).sqrt()
    return lengths.clamp_min(torch.finfo(torch.float32).tiny)


class _FrozenProduct(torch.autograd.Function):
    """x W^T with a weight that is held in another type: it is opened for the product, and again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, range_: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, range_)
        ctx.dtype = dtype
        ctx.type_of_input = x.dtype
        return F.linear(x.to(dtype), _open(weight, scale, range_, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight, scale, range_ = ctx.saved_tensors
        product = grad.to(ctx.dtype) @ _open(weight, scale, range_, ctx.dtype)
        return product.to(ctx.type_of_input), None, None, None, None


def _open(weight: Tensor, scale: Tensor | None, range_: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return weight.to(dtype)
    assert range_ is not None
    return dequantise(NF4(weight, scale, range_), dtype)
