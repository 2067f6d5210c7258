"""The residual stream between blocks: where a rank holds which tokens of it, and how modules enter and leave it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.comm.mesh import Axis
from trainwright.parallel.tensor.collectives import (
    cut,
    gather_and_scatter_gradient,
    keep_and_sum_gradient,
    scatter_sum_and_gather_gradient,
    sum_and_keep_gradient,
)

__all__ = ["Stream"]

TOKENS = 1
"""The dimension of tokens in activations [B, T, D]."""


class Stream:
    """One model's residual stream on the ranks of a tensor axis, shared by the modules that enter and leave it.

    Divided, each rank holds T / t neighbouring tokens of every row, and whatever works on single tokens (norms,
    additions, dropout) works on those alone (sequence parallelism, arXiv 2205.05198). Whole, each rank holds all.

    Training is always divided, so that a recomputed block does what it did the first time. Without gradients the
    stream is whole where t does not divide T: a decoded token is one.

    Args:
        axis: the ranks.
        always_whole: for models whose own code between the linears expects all tokens.
    """

    def __init__(self, axis: Axis, *, always_whole: bool = False) -> None:
        self.axis = axis
        self.always_whole = always_whole
        self._cut = True  # of the forward pass under way; only asked where no gradient is kept

    @property
    def divided(self) -> bool:
        """Whether each rank holds a part of the tokens, in the forward pass under way."""
        return not self.always_whole and (self._cut or torch.is_grad_enabled())

    def begin(self, tokens: int) -> None:
        """A forward pass over rows of `tokens` tokens begins.

        Raises:
            ModelError: with gradients, for a number of tokens that the ranks do not divide.
        """
        if self.always_whole:
            return
        self._cut = tokens % self.axis.size == 0
        if not self._cut and torch.is_grad_enabled():
            raise ModelError(
                f"rows of {tokens} tokens cannot be divided over parallel.tensor {self.axis.size} ranks",
                hint=f"train on rows of a multiple of {self.axis.size} tokens (data.sequence_length, or pad the batch)",
            )

    def resume(self, here: int, tokens: int) -> None:
        """A forward pass over rows of `tokens` tokens goes on with `here` of them on this rank.

        Raises:
            ModelError: that is neither all of them nor this rank's share.
        """
        if self.always_whole:
            return
        if here != tokens and here * self.axis.size != tokens:
            raise ModelError(
                f"{here} of {tokens} tokens are here; expected {tokens / self.axis.size:g} on each of "
                f"{self.axis.size} ranks, or all"
            )
        self._cut = here != tokens

    def enter(self, x: Tensor) -> Tensor:
        """The stream's x, as it is held, to all tokens [B, T, D] for a matrix whose output features are divided."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(kind))  # in which it will be multiplied: half as much to send
        if self.divided:
            return gather_and_scatter_gradient(x, self.axis, TOKENS)
        return keep_and_sum_gradient(x, self.axis)

    def leave(self, x: Tensor) -> Tensor:
        """This rank's addend [B, T, D] to the sum over the ranks, as the stream is held."""
        if self.divided:
            return scatter_sum_and_gather_gradient(x, self.axis, TOKENS)
        return sum_and_keep_gradient(x, self.axis)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """What this rank's stream holds of something whole with tokens in dimension `dim`."""
        return cut(x, self.axis, dim) if self.divided else x
