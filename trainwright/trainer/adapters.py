"""A recipe's adapters: put into the model before it is divided, and written when the run ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.events import emit
from trainwright.config import AdapterSection
from trainwright.engine.materialise import Values, materialise
from trainwright.models import build_model, kept_tensors, save_pretrained
from trainwright.models.adapters import (
    adapter_options,
    adapter_report,
    adapter_values,
    apply_adapter,
    merged_source,
    save_adapter,
    saved_values,
)
from trainwright.models.adapters.peft_methods import apply_peft_method, merge_peft_method, save_peft_method
from trainwright.models.exporting import WeightSource

__all__ = ["adapt", "merged_peft_model", "save_adapters"]

_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What peft puts into the names of the modules that it wraps."""


def adapt(
    model: nn.Module,
    section: AdapterSection | None,
    values: Values,
    *,
    compute: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Values:
    """Give a model on the meta device the adapters of a recipe, in place; returns the values of its parameters.

    A method of peft needs the weights: the model gets them here, whole on this rank, and `materialise` finds nothing
    more to do.

    Args:
        values: of the model without adapters. compute: the type of matrix products.
    """
    if section is None:
        return values
    if section.name == "peft":
        materialise(model, device, values)
        emit("notice", message=str(apply_peft_method(model, section.config, seed=seed)))
        return values
    report = apply_adapter(model, adapter_options(section, compute), seed=seed)
    emit("notice", message=str(report))
    saved = None if section.path is None else saved_values(model, section.path)
    return adapter_values(report.linears, values, seed=seed, saved=saved)


def save_adapters(
    model: Any,
    section: AdapterSection | None,
    source: WeightSource,
    folder: Path,
    *,
    base: str | None,
    generation: Mapping[str, Any],
) -> WeightSource | None:
    """Write the adapters of a model, if it has any, to `folder`; returns its weights with adapters merged, to be
    exported. None for methods of peft: `merged_peft_model` makes a model of these.

    Args:
        source: reads the parameters of the model, however it is divided.
        base: the folder or name of the model that the adapters belong to.
        generation: keys of generation_config.json, for who merges the adapters later.
    """
    report = adapter_report(model)
    if report is not None:
        save_adapter(model, folder, source=source, base=base, generation=generation)
        return merged_source(report, source)
    if section is not None and section.name == "peft":
        save_peft_method(model, folder, source=source, base=base)
        return None
    return source


@torch.no_grad()
def merged_peft_model(
    config: Any, section: AdapterSection, source: WeightSource, folder: Path, *, seed: int, **options: Any
) -> Path:
    """Write the whole model of a run with a method of peft: made again on this rank, filled from `source`, merged by
    peft, and saved by `save_pretrained` with `options`.

    Args:
        seed: of the run, from which the method drew what it keeps beside its parameters.
    """
    model = _made_again(config, section, source, seed)
    merge_peft_method(model)
    return save_pretrained(model, folder, **options)


def _made_again(config: Any, section: AdapterSection, source: WeightSource, seed: int) -> Any:
    """A whole model of this configuration with a method of peft, and the weights of `source`.

    The base gets its weights first: what a method makes of them (the directions of OSF, say), and what it draws at
    random, is in no parameter.
    """
    model = build_model(config, dtype=next(iter(source.dtypes.values())))
    of_base = {_WRAPPED.sub("", name): name for name in source.shapes}
    for name, parameter in model.named_parameters():
        _fill(parameter, source, of_base[name])
    apply_peft_method(model, section.config, seed=seed)
    for name, tensor in kept_tensors(model).items():
        _fill(tensor, source, name)
    return model


def _fill(tensor: Tensor, source: WeightSource, name: str) -> None:
    shape = source.shapes[name]
    tensor.copy_(source.read(name, 0, shape[0] if shape else 1))
