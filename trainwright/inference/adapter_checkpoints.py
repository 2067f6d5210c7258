"""Adapters in a checkpoint of a run: which they are, and what they stand beside, is written beside the model's
configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainwright.base.errors import CheckpointError, ModelError
from trainwright.models.adapters import AdapterReport, BaseModel, apply_adapter
from trainwright.models.adapters.values import Values
from trainwright.models.registry import ModelConfig

__all__ = ["adapters_in", "frozen_values"]


def adapters_in(
    meta: Mapping[str, Any], names: Iterable[str], model: nn.Module, path: str | Path
) -> AdapterReport | None:
    """Give a model on the meta device the adapters that a checkpoint has; None where it has none.

    Args:
        meta: the checkpoint's description. names: of the parameters in it.

    Raises:
        CheckpointError: it holds adapters and does not say which: without them the model would be another.
    """
    fields = meta.get("adapter")
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


def frozen_values(
    meta: Mapping[str, Any], report: AdapterReport | None, config: ModelConfig, path: str | Path
) -> Values | None:
    """The parameters that a checkpoint of adapters does not hold, read from the model that it names; None where it
    holds all.

    Args:
        meta: the checkpoint's description. config: of the model in it.

    Raises:
        CheckpointError: that model is gone, or its weights have changed.
    """
    if report is None or "base" not in meta:
        return None
    try:
        return BaseModel(**meta["base"]).values(report, config)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error
