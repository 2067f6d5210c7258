"""`adapter`: train a small addition to a frozen model instead of the model."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from trainwright.config.fields import Real, Whole, Words
from trainwright.config.section import Section, by_name

__all__ = ["Adapter", "AdapterSection"]


class AdapterSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen linears."""

    name: Annotated[Literal["lora", "rslora", "dora", "qlora"], Words(("lora", "rslora", "dora", "qlora"))] = "lora"
    """lora; rslora: scaled by the root of the rank (arXiv 2312.03732); dora: magnitude and direction apart (arXiv
    2402.09353); qlora: lora over a base in 4-bit NormalFloat (arXiv 2305.14314)."""
    rank: Annotated[int, Whole(minimum=1)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Real(above=0)] = 32.0
    """The addition is scaled by alpha / rank (rslora: alpha / root of rank)."""
    dropout: Annotated[float, Real(minimum=0, below=1)] = 0.0
    """Dropout of the adapter's input."""


Adapter: TypeAlias = Annotated[
    AdapterSection | None, BeforeValidator(by_name, json_schema_input_type=str | AdapterSection | None)
]
