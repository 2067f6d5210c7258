"""First values of adapters, as functions of names: every layout starts from the same ones.

A is drawn as torch draws a linear (kaiming uniform with a = sqrt(5), as peft does), B is zero: the model computes what
it did before. Magnitudes and codes of 4 bits are made of the base's weight, one linear at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.models.adapters.linear import NF4_LEAVES, AdaptedLinear, row_norms
from trainwright.models.adapters.nf4 import NF4, dequantise, quantise

__all__ = ["Values", "adapter_value", "adapter_values", "fill", "weight_parts"]

Values = Callable[[str, Sequence[int], torch.dtype], Tensor]
"""(name, shape, dtype) of a parameter or kept buffer -> its whole value."""


def adapter_value(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor | None:
    """The value from which A or B of an adapter starts; None for any other parameter."""
    leaf = name.rpartition(".")[2]
    if leaf == "lora_B":
        return torch.zeros(tuple(shape), dtype=dtype)
    if leaf != "lora_A":
        return None
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator).to(dtype)


def adapter_values(
    linears: Mapping[str, Any], base: Values, *, seed: int, saved: Mapping[str, Tensor] | None = None
) -> Values:
    """Values of a model with adapters, for `materialise`: pretrained weights of `base`, adapters from their names.

    A weight in 4 bits is quantised when it is asked for; what its linear needs beside it is kept until another linear
    is asked for, so that each weight is read once and one is held at a time.

    Args:
        linears: `AdapterReport.linears`.
        base: gives the parameters of the model without adapters, under their names.
        saved: values of parameters that go before all others: an adapter to go on from (`load_saved_adapter`).
    """
    return _AdapterValues(linears, base, seed, saved or {})


class _AdapterValues:
    def __init__(self, linears: Mapping[str, Any], base: Values, seed: int, saved: Mapping[str, Tensor]) -> None:
        self.linears = linears
        self.base = base
        self.seed = seed
        self.saved = saved
        self._of: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if name in self.saved:
            return self.saved[name].to(dtype)
        module, _, leaf = name.rpartition(".")
        linear = self.linears.get(module)
        if linear is None:
            return self.base(name, shape, dtype)
        own = adapter_value(name, shape, dtype, self.seed)
        if own is not None:
            return own
        if leaf == "magnitude" or (linear.nf4 and leaf in NF4_LEAVES):
            return self._made(module, linear)[leaf].to(dtype)
        return self.base(name, shape, dtype)

    def _made(self, module: str, linear: Any) -> dict[str, Tensor]:
        """What is made of the weight of one linear."""
        if self._of[0] != module:
            weight = self.base(f"{module}.weight", (linear.out_features, linear.in_features), torch.float32)
            made: dict[str, Tensor] = {}
            if linear.nf4:
                parts = weight_parts(weight)
                made.update(zip(NF4_LEAVES, parts, strict=True))
                weight = dequantise(parts, torch.float32)
            else:
                weight = linear.as_held(weight)
            made["magnitude"] = row_norms(lambda begin, stop: weight[begin:stop], None, None, 1.0)
            self._of = (module, made)
        return self._of[1]


def weight_parts(weight: Tensor) -> NF4:
    """A weight in 4 bits."""
    return quantise(weight)


@torch.no_grad()
def fill(module: AdaptedLinear, name: str, value: Callable[[str, Sequence[int], torch.dtype], Tensor | None]) -> None:
    """Give the adapter of a linear that has its weight the values to start from."""
    for leaf in ("lora_A", "lora_B"):
        parameter = module.get_parameter(leaf)
        found = value(f"{name}.{leaf}", tuple(parameter.shape), parameter.dtype)
        assert found is not None
        parameter.copy_(found)
    if module.magnitude is not None:
        module.magnitude.copy_(row_norms(module.weight_rows, None, None, 1.0))
