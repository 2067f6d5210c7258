"""From the input of a transformers model's output projection to its loss, whatever its code does before and behind.

What lies before the projection (BERT's transform, T5's factor, OPT's second projection) runs as the model's own code:
its forward pass is stopped where it calls the projection. What lies behind (a cap, a factor, a second bias) is known by
the fields that transformers has for it, and compared with the model's own logits before the first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainwright.base.errors import ModelError
from trainwright.ops.linear_cross_entropy import LossSums, auto_chunk_tokens, compute_type, linear_cross_entropy

__all__ = ["Reached", "Tail", "projection_loss", "standing_in", "tail_of"]

_CAPS = ("final_logit_softcapping", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)


class Reached(BaseException):
    """Ends a forward pass where the output projection would run; carries what it was given.

    Not an Exception: no handler of a model's own code may take it.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """In the place of the projection: its attributes, another function."""

    def __init__(self, projection: nn.Module, function: Any) -> None:
        super().__init__()
        self.__dict__["projection"] = projection
        self.__dict__["function"] = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["projection"], name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return self.__dict__["function"](hidden)


@contextlib.contextmanager
def standing_in(model: nn.Module, name: str, function: Any) -> Iterator[None]:
    """Inside, calls of the submodule `name` are calls of `function`; its hooks and parameters rest."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    projection = parent._modules[leaf]
    assert projection is not None
    parent._modules[leaf] = _StandIn(projection, function)
    try:
        yield
    finally:
        parent._modules[leaf] = projection


@dataclass(frozen=True)
class Tail:
    """What happens to logits behind the projection: (logits * factor + bias), capped."""

    factor: float = 1.0
    cap: float | None = None
    bias: str | None = None

    def __call__(self, logits: Tensor, model: nn.Module) -> Tensor:
        """Logits [..., V] as the model gives them."""
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.bias is not None:
            logits = logits + model.get_buffer(self.bias).reshape(-1).to(logits.dtype)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def tail_of(config: Any, model: nn.Module) -> Tail:
    """The tail that a configuration of transformers and a buffer `final_logits_bias` (BART) mean."""
    text = config.get_text_config()

    def number(names: tuple[str, ...]) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((float(value) for value in found if isinstance(value, int | float)), None)

    factor = (number(_FACTORS) or 1.0) / (number(_DIVISORS) or 1.0)
    bias = "final_logits_bias" if "final_logits_bias" in dict(model.named_buffers(recurse=False)) else None
    return Tail(factor, number(_CAPS), bias)


def projection_loss(
    model: nn.Module,
    projection: nn.Module,
    tail: Tail,
    hidden: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
) -> LossSums:
    """Loss sums of the model's logits for hidden [N, D] against labels [N], some tokens at a time.

    Raises:
        ModelError: the projection has no weight [V, D].
    """
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"the output projection is a {type(projection).__name__}, expected a weight [V, D]")
    if isinstance(weight, DTensor) or weight.shape[1] != hidden.shape[1]:
        return _loss_by_module(model, projection, tail, hidden, labels, label_smoothing, z_loss)
    if bias is not None and tail.factor != 1.0:
        bias = bias * tail.factor
    if tail.bias is not None:
        further = model.get_buffer(tail.bias).reshape(-1).to(weight.dtype)
        bias = further if bias is None else bias + further
    return linear_cross_entropy(
        hidden if tail.factor == 1.0 else hidden * tail.factor,
        weight,
        labels,
        bias=bias,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=tail.cap,
        compiled=compiled,
    )


def _loss_by_module(
    model: nn.Module,
    projection: nn.Module,
    tail: Tail,
    hidden: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> LossSums:
    """The same by calling the projection itself, whose weight is divided; each chunk of logits is made again in
    backward."""
    words = int(getattr(projection, "out_features", hidden.shape[1]))
    each = auto_chunk_tokens(hidden.shape[0], words, compute_type(hidden), hidden.device.type)

    def chunk_sums(part: Tensor, targets: Tensor) -> Tensor:
        logits = tail(projection(part), model).float()
        with torch.autocast(hidden.device.type, enabled=False):
            counted = targets != -100
            smooth = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
            nll = F.cross_entropy(logits.detach(), targets, reduction="sum")
            z_sum = z_loss * (torch.logsumexp(logits, -1).square() * counted).sum()
            correct = ((logits.argmax(-1) == targets) & counted).sum()
        return torch.stack((smooth + z_sum, z_sum.detach(), nll, correct.to(nll.dtype)))

    sums = torch.zeros(4, device=hidden.device)
    for start in range(0, hidden.shape[0], each):
        inside = slice(start, start + each)
        sums = sums + checkpoint(chunk_sums, hidden[inside], labels[inside], use_reentrant=False)
    loss_sum, z_sum, nll_sum, correct = sums.unbind()
    count = (labels != -100).sum()
    return LossSums(loss_sum, count, z_sum.detach(), nll_sum.detach(), correct.detach().to(torch.int64))
