"""Low-rank adapters beside frozen linears, in peft's files."""

from __future__ import annotations

from trainwright.models.adapters.apply import AdaptedShape, AdapterReport, adapter_report, apply_adapter
from trainwright.models.adapters.linear import AdaptedLinear
from trainwright.models.adapters.options import AdapterOptions
from trainwright.models.adapters.values import adapter_value, adapter_values

__all__ = [
    "AdaptedLinear",
    "AdaptedShape",
    "AdapterOptions",
    "AdapterReport",
    "adapter_report",
    "adapter_value",
    "adapter_values",
    "apply_adapter",
]
