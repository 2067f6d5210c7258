"""Putting adapters beside the linears of a model, and freezing the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.base.text import human_bytes
from trainwright.models.adapters.linear import NF4_LEAVES, AdaptedLinear
from trainwright.models.adapters.nf4 import BLOCK, NF4, nf4_bytes
from trainwright.models.adapters.options import AdapterOptions, Base
from trainwright.models.adapters.targets import extra_parameters, target_linears
from trainwright.models.adapters.values import adapter_value, fill, weight_parts
from trainwright.models.dropout import Dropout
from trainwright.models.weights import kept_tensors

__all__ = ["AdaptedShape", "AdapterReport", "adapter_report", "apply_adapter"]

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AdaptedShape:
    """One adapted linear: its features, and how its weight is held."""

    out_features: int
    in_features: int
    base: Base

    @property
    def nf4(self) -> bool:
        """Whether the weight is held in 4 bits."""
        return self.base == "nf4"

    def as_held(self, weight: Tensor) -> Tensor:
        """A weight in fp32, with the precision in which it is held where that is another float."""
        return weight.to(TYPES[self.base]).float() if self.base in TYPES else weight


@dataclass(frozen=True)
class AdapterReport:
    """What `apply_adapter` made of a model; the same on every rank, whatever part of the model it comes to hold.

    Attributes:
        options: as they were given.
        linears: adapted linears by name.
        extra: names of parameters that are trained as they are: the task head's, and those of `options.train`.
        trained, total: parameters (numbers), adapters and task head included; a tied one counts once.
        base_bytes: of the frozen weights of adapted linears as they are held; base_bytes_bf16: as bf16 holds them.
    """

    options: AdapterOptions
    linears: dict[str, AdaptedShape]
    extra: tuple[str, ...]
    trained: int
    total: int
    base_bytes: int
    base_bytes_bf16: int

    def to_fields(self) -> dict[str, Any]:
        """JSON values from which `from_fields` makes an equal report: for a checkpoint to carry along."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> AdapterReport:
        """The inverse of `to_fields`."""
        given = dict(values)
        options: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in given.pop("options").items()
        }
        linears = {name: AdaptedShape(**shape) for name, shape in given.pop("linears").items()}
        return cls(options=AdapterOptions(**options), linears=linears, extra=tuple(given.pop("extra")), **given)

    @property
    def share(self) -> float:
        """Of all parameters, those that are trained."""
        return self.trained / max(1, self.total)

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter of that name is what the model was before, and stays it."""
        module, _, leaf = name.rpartition(".")
        if module in self.linears:
            return leaf not in ("lora_A", "lora_B", "magnitude")
        return name not in self.extra

    def __str__(self) -> str:
        options = self.options
        number = len(self.extra)
        whole = f", {number} parameter{'s' * (number != 1)} as they are" if number else ""
        held = f"; their frozen weights take {human_bytes(self.base_bytes)}"
        if self.options.base == "nf4":
            held += f" in 4 bits, {self.base_bytes / self.base_bytes_bf16:.2f} of bf16"
        return (
            f"{options.name} of rank {options.rank} beside {len(self.linears)} linears{whole}: {self.trained:,} of"
            f" {self.total:,} parameters are trained ({self.share:.2%}){held}"
        )


def apply_adapter(model: nn.Module, options: AdapterOptions, *, seed: int = 0) -> AdapterReport:
    """Give linears of `model` an adapter in place and freeze all but adapters, task head and `options.train`.

    Names and shapes of the model's own parameters stay (a weight in 4 bits becomes its codes, and has parameters for
    its magnitudes beside it). Call it after the task's head is attached and before the model is divided.

    On the meta device parameters get no values: give `materialise` those of `adapter_values`. Elsewhere they get their
    values here; the model computes what it did before, up to the rounding of its weights to `options.base`.

    Raises:
        ConfigError: a pattern finds nothing, or what cannot have an adapter or be trained.
        ModelError: the model has adapters already.
    """
    if adapter_report(model) is not None:
        raise ModelError(
            f"{type(model).__name__} has adapters already", hint="merge them (`trainwright merge`), then add new ones"
        )
    linears = target_linears(model, options.targets)
    extra = extra_parameters(model, options.train, linears)
    total_before = _numbers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = set(extra)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in chosen:
            parameter.requires_grad_(True)
    shapes = {}
    for name, module in linears.items():
        shapes[name] = _adapt(module, name, options, seed)
    added = sum(_added(module) for module in linears.values())
    trained = sum(p.numel() for p in {id(p): p for p in model.parameters() if p.requires_grad}.values())
    report = AdapterReport(
        options=options,
        linears=shapes,
        extra=tuple(extra),
        trained=trained,
        total=total_before + added,
        base_bytes=sum(_base_bytes(module) for module in linears.values()),
        base_bytes_bf16=sum(2 * shape.out_features * shape.in_features for shape in shapes.values()),
    )
    model.__dict__["_adapter_report"] = report
    return report


def adapter_report(model: nn.Module) -> AdapterReport | None:
    """What `apply_adapter` said of `model`; None where it has no adapters."""
    report: AdapterReport | None = model.__dict__.get("_adapter_report")
    return report


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for name, tensor in kept_tensors(model).items() if isinstance(tensor, nn.Parameter))


def _added(module: nn.Module) -> int:
    assert isinstance(module, AdaptedLinear)
    parts = (module.lora_A, module.lora_B, module.magnitude)
    return sum(part.numel() for part in parts if part is not None)


def _base_bytes(module: nn.Module) -> int:
    parts = [module._parameters.get(leaf) for leaf in NF4_LEAVES]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _adapt(module: nn.Linear, name: str, options: AdapterOptions, seed: int) -> AdaptedShape:
    """Make an `AdaptedLinear` of a linear, with values where it has some."""
    rows, columns = module.out_features, module.in_features
    in_4_bits = options.base == "nf4" and columns % 2 == 0 and columns >= BLOCK
    weight = module.weight.detach()
    # Trained numbers are as precise as the model's: fp32 unless its parameters are all half as long.
    dtype = weight.dtype
    device = weight.device
    module.__class__ = AdaptedLinear
    assert isinstance(module, AdaptedLinear)
    module.scaling = options.scaling
    module.lora_dropout = Dropout(options.dropout)
    module.keeps_type = options.base != "as_is"
    _hold_base(module, weight, options, in_4_bits=in_4_bits)
    module.lora_A = _parameter((options.rank, columns), dtype, device)
    module.lora_B = _parameter((rows, options.rank), dtype, device)
    module.magnitude = _parameter((rows,), dtype, device) if options.name == "dora" else None
    if device.type != "meta":
        fill(module, name, lambda leaf, shape, kind: adapter_value(leaf, shape, kind, seed))
    base: Base = "nf4" if in_4_bits else "as_is" if options.base == "nf4" else options.base
    return AdaptedShape(rows, columns, base)


def _parameter(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device))


def _hold_base(module: AdaptedLinear, weight: Tensor, options: AdapterOptions, *, in_4_bits: bool) -> None:
    """Hold the weight as it is to be held, in 4 bits with its magnitudes beside it."""
    parts: NF4 | None = None
    if in_4_bits:
        parts = weight_parts(weight) if not weight.is_meta else _empty_parts(*weight.shape)
        weight = parts.codes
    elif options.base in TYPES:
        weight = weight.to(TYPES[options.base])
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.weight_scale = None if parts is None else nn.Parameter(parts.scale, requires_grad=False)
    module.weight_range = None if parts is None else nn.Parameter(parts.range, requires_grad=False)


def _empty_parts(rows: int, columns: int) -> NF4:
    blocks = math.ceil(columns / BLOCK)
    parts = NF4(
        torch.empty((rows, columns // 2), dtype=torch.int8, device="meta"),
        torch.empty((rows, blocks), dtype=torch.int8, device="meta"),
        torch.empty((rows, 1), dtype=torch.float32, device="meta"),
    )
    assert sum(part.numel() * part.element_size() for part in parts) == nf4_bytes(rows, columns)
    return parts
