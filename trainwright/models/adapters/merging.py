"""Adapters become part of the weights that they stand beside: W + s B A, in the precision of the adapters.

A weight that is held in 4 bits is opened first; nothing is ever added to codes. What the merged model computes differs
from what was trained by rounding alone, and `trainwright merge` measures that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.adapters.apply import AdapterReport, adapter_report
from trainwright.models.adapters.held import opened_rows
from trainwright.models.adapters.linear import ADAPTER_LEAVES, NF4_LEAVES, AdaptedLinear, row_norms
from trainwright.models.adapters.saving import source_of
from trainwright.models.exporting import WeightSource

__all__ = ["merge_adapter", "merged_source"]


def merged_source(report: AdapterReport, source: WeightSource) -> WeightSource:
    """The weights of a model with adapters as those of the model without, to read on demand: for `save_weights`.

    Holds some rows of one weight at a time, and the A of its adapter. Merged weights have the type of the adapters.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, shape in source.shapes.items():
        module, _, leaf = name.rpartition(".")
        linear = report.linears.get(module)
        if linear is None or leaf not in (*ADAPTER_LEAVES, *NF4_LEAVES):
            shapes[name], dtypes[name] = shape, source.dtypes[name]
        elif leaf == "weight":
            shapes[name] = (linear.out_features, linear.in_features)
            dtypes[name] = source.dtypes[f"{module}.lora_A"]

    def read(name: str, first: int, rows: int) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if module in report.linears and leaf == "weight":
            return _merged_rows(report, source, module, first, rows).to(dtypes[name])
        return source.read(name, first, rows)

    return WeightSource(shapes, dtypes, read)


def _merged_rows(report: AdapterReport, source: WeightSource, module: str, first: int, rows: int) -> Tensor:
    """Rows of W + s B A in fp32, with their lengths where the method is DoRA."""
    options = report.options

    def part(leaf: str) -> Tensor:
        return source.read(f"{module}.{leaf}", first, rows)

    a = source.read(f"{module}.lora_A", 0, options.rank).float()
    b = part("lora_B").float()
    weight = opened_rows(report, source, module, first, rows)
    if options.name != "dora":
        return torch.addmm(weight, b, a, alpha=options.scaling)
    lengths = row_norms(lambda begin, stop: weight[begin:stop], a, b, options.scaling)
    scale = part("magnitude").float() / lengths
    return torch.addmm(weight, b, a, alpha=options.scaling) * scale[:, None]


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Make adapters part of the weights, in place; returns the model, which has no adapters any more.

    All its parameters can be trained again.

    Raises:
        ModelError: it has no adapters, or is divided over processes.
    """
    report = adapter_report(model)
    if report is None:
        raise ModelError(f"{type(model).__name__} has no adapters to merge")
    divided = [name for name, _ in _adapted(model, report) if type(model.get_submodule(name)) is not AdaptedLinear]
    if divided:
        raise ModelError(
            f"{divided[0]} is divided over processes", hint="save the adapters, and merge them with `trainwright merge`"
        )
    for name, module in _adapted(model, report):
        weight = merged_source(report, source_of(module, f"{name}.")).read(f"{name}.weight", 0, module.out_features)
        bias = module._parameters.get("bias")
        for leaf in (*ADAPTER_LEAVES, *NF4_LEAVES, "bias"):
            module._parameters.pop(leaf, None)
        for leaf in ("scaling", "keeps_type", *ADAPTER_LEAVES, *NF4_LEAVES):
            module.__dict__.pop(leaf, None)
        module._modules.pop("lora_dropout", None)
        module.__class__ = nn.Linear  # type: ignore[assignment]
        module.register_parameter("weight", nn.Parameter(weight))
        module.register_parameter("bias", bias)
    del model.__dict__["_adapter_report"]
    return model.requires_grad_(True)


def _adapted(model: nn.Module, report: AdapterReport) -> Iterator[tuple[str, AdaptedLinear]]:
    for name in report.linears:
        module = model.get_submodule(name)
        assert isinstance(module, AdaptedLinear)
        yield name, module
