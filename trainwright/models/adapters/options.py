"""What an adapter is, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from trainwright.base.errors import ConfigError
from trainwright.config.adapter_section import AdapterSection

__all__ = ["METHODS", "AdapterOptions", "Base", "adapter_options"]

METHODS = ("lora", "rslora", "dora")

Base = Literal["as_is", "fp32", "bf16", "fp16", "nf4"]
"""In which type the frozen weights of adapted linears are held; "as_is" leaves them as the model has them."""


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters (LoRA, arXiv 2106.09685).

    Attributes:
        name: lora; rslora (scaled by alpha / sqrt(rank), arXiv 2312.03732); dora (magnitude and direction apart, arXiv
            2402.09353).
        rank: r of A [r, in] and B [out, r].
        alpha: the addition is scaled by alpha / rank.
        dropout: probability, of the adapter's input.
        targets: patterns searched in the names of linears; None takes every linear inside the repeated blocks.
        train: patterns searched in names of parameters that are trained as they are, beside adapters and task head.
        base: see `Base`.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    train: tuple[str, ...] = ()
    base: Base = "as_is"

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ConfigError(f"adapter {self.name!r} is not one of {', '.join(METHODS)}")
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha of an adapter is {self.alpha}, expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the dropout of an adapter is {self.dropout}, expected at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.name == "rslora" else self.rank)


def adapter_options(section: AdapterSection, compute: torch.dtype) -> AdapterOptions:
    """The options that a recipe's `adapter` means.

    Frozen weights are held in the type in which they are multiplied: they need no more, and products are the same.

    Args:
        compute: the type of matrix products (`Precision.compute_dtype`).

    Raises:
        ConfigError: the section is about a method of peft.
    """
    if section.name == "peft":
        raise ConfigError("adapter.name is peft: its method is put into the model by apply_peft_method")
    held: dict[torch.dtype, Base] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    base: Base = held.get(compute, "as_is") if section.base == "auto" else section.base
    return AdapterOptions(
        name="lora" if section.name == "qlora" else section.name,
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        targets=section.targets,
        train=section.train,
        base="nf4" if section.name == "qlora" else base,
    )
