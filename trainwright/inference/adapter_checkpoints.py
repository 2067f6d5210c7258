"""Adapters in a checkpoint of a run: which they are is written beside the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainwright.base.errors import CheckpointError, ModelError
from trainwright.models.adapters import AdapterReport, apply_adapter

__all__ = ["ADAPTER_KEY", "adapters_in"]

ADAPTER_KEY = "adapter"
"""Where a checkpoint's description has the fields of an `AdapterReport`."""


def adapters_in(
    meta: Mapping[str, Any], names: Iterable[str], model: nn.Module, path: str | Path
) -> AdapterReport | None:
    """Give a model on the meta device the adapters that a checkpoint has; None where it has none.

    Args:
        meta: the checkpoint's description. names: of the parameters in it.

    Raises:
        CheckpointError: it holds adapters and does not say which: without them the model would be another.
    """
    fields = meta.get(ADAPTER_KEY)
    if fields is None:
        if any(name.endswith(".lora_A") for name in names):
            raise CheckpointError(
                f"{path} holds adapters and does not say which", hint="export the run when it has ended, from model/"
            )
        return None
    report = AdapterReport.from_fields(fields)
    try:
        apply_adapter(model, report.options)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    return report
