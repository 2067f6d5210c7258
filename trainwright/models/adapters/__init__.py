"""Low-rank adapters beside frozen linears, in peft's files."""

from __future__ import annotations

from trainwright.models.adapters.apply import AdaptedShape, AdapterReport, adapter_report, apply_adapter
from trainwright.models.adapters.base_model import BaseModel
from trainwright.models.adapters.folder import SavedAdapter, is_adapter_folder
from trainwright.models.adapters.linear import AdaptedLinear
from trainwright.models.adapters.loading import load_adapter, saved_values
from trainwright.models.adapters.merging import merge_adapter, merged_source
from trainwright.models.adapters.options import AdapterOptions, adapter_options
from trainwright.models.adapters.saving import save_adapter
from trainwright.models.adapters.values import adapter_value, adapter_values

__all__ = [
    "AdaptedLinear",
    "AdaptedShape",
    "AdapterOptions",
    "AdapterReport",
    "BaseModel",
    "SavedAdapter",
    "adapter_options",
    "adapter_report",
    "adapter_value",
    "adapter_values",
    "apply_adapter",
    "is_adapter_folder",
    "load_adapter",
    "merge_adapter",
    "merged_source",
    "save_adapter",
    "saved_values",
]
