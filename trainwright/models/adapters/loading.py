"""The values of a folder of adapters, by the names that they have in a model; and a model given them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.adapters.apply import AdapterReport, adapter_report, apply_adapter
from trainwright.models.adapters.folder import SavedAdapter
from trainwright.models.adapters.linear import ADAPTER_LEAVES
from trainwright.models.adapters.names import PREFIX, FileNames, FileTensor
from trainwright.models.adapters.options import Base
from trainwright.models.adapters.targets import extra_parameters, target_linears
from trainwright.models.head_files import is_head_tensor

__all__ = ["load_adapter", "saved_values"]

_SHOWN = 6


def load_adapter(model: nn.Module, folder: str | Path, *, base: Base = "as_is") -> AdapterReport:
    """Give a model that has its weights the adapters of a folder, in place.

    Args:
        model: the one that the adapters were trained on, with their task's head where they have one.
        base: how the frozen weights are held from now on.

    Raises:
        ModelError: the folder holds no adapters that can be read, or they do not fit the model (names some).
    """
    if adapter_report(model) is not None:
        raise ModelError(
            f"{type(model).__name__} has adapters already", hint="merge them (merge_adapter), then load others"
        )
    saved = SavedAdapter(folder)
    options = saved.targets_in(model, _known_config(model), base=base)
    linears = target_linears(model, options.targets)
    # Read before the model is changed: where the file does not fit, the model stays what it was.
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    values = _read(saved, shapes, extra_parameters(model, options.train, linears), model)
    report = apply_adapter(model, options)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return report


def saved_values(model: nn.Module, folder: str | Path) -> Mapping[str, Tensor]:
    """Values of a folder of adapters by name, for `adapter_values(saved=...)`: a model with adapters goes on from them.

    Args:
        model: with adapters, whole or on the meta device, not divided yet.

    Raises:
        ModelError: the folder's adapters are of another method, or not beside the same linears.
    """
    report = adapter_report(model)
    if report is None:
        raise ModelError(f"{type(model).__name__} has no adapters to give the values of {folder}")
    saved = SavedAdapter(folder)
    mine, theirs = report.options, saved.options()
    for what in ("name", "rank", "alpha"):
        if getattr(mine, what) != getattr(theirs, what):
            raise ModelError(
                f"the adapters in {folder} have {what} {getattr(theirs, what)}, expected {getattr(mine, what)}",
                hint=f"set adapter.{what} to {getattr(theirs, what)}",
            )
    linears = {name: (linear.out_features, linear.in_features) for name, linear in report.linears.items()}
    return _read(saved, linears, report.extra, model)


def _known_config(model: nn.Module) -> Any | None:
    """The configuration of a model that the registry knows."""
    config: Any = getattr(model, "config", None)
    return config if hasattr(config, "family") else None


def _read(
    saved: SavedAdapter, linears: Mapping[str, tuple[int, int]], extra: Sequence[str], model: nn.Module
) -> Mapping[str, Tensor]:
    """Every value of a folder under the name that it has in a model with these adapters.

    Args:
        linears: (output, input) features of adapted linears, by name. extra: names of parameters trained as they are.

    Raises:
        ModelError: file and model do not have the same parameters; names some.
    """
    names = FileNames(_known_config(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = _adapters(saved, linears, names) | _others(saved, extra, names, shapes)
    _refuse_other_tensors(saved, wanted, _tied(saved, names, wanted))
    for key, one in wanted.items():
        if saved.shapes[key] != one.shape:
            raise ModelError(f"{saved.folder}: {key} is {list(saved.shapes[key])}, expected {list(one.shape)}")
    found: dict[str, Tensor] = {}
    for key, one in wanted.items():
        value = saved.tensor(key)
        if one.linear is not None:
            found[one.name] = names.from_file(*one.linear, one.name.rpartition(".")[2], value)
            continue
        assert one.part is not None
        value = names.part_from_file(one.part, value)
        if one.part.row is None:
            found[one.name] = value
        else:
            found.setdefault(one.name, torch.empty(shapes[one.name], dtype=value.dtype))[one.part.row] = value
    return found


def _adapters(saved: SavedAdapter, linears: Mapping[str, tuple[int, int]], names: FileNames) -> dict[str, FileTensor]:
    """The tensors of adapters, by their names in the file."""
    options = saved.options()
    found = {}
    for module, (rows, columns) in linears.items():
        parts = {"lora_A": (options.rank, columns), "lora_B": (rows, options.rank), "magnitude": (rows,)}
        for leaf in ADAPTER_LEAVES if options.name == "dora" else ("lora_A", "lora_B"):
            shape = (rows, columns)
            found[names.tensor(module, shape, leaf)] = FileTensor(f"{module}.{leaf}", parts[leaf], (module, shape))
    return found


def _others(
    saved: SavedAdapter, extra: Sequence[str], names: FileNames, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, FileTensor]:
    """The tensors of other parameters, by their names in the file."""
    found = {}
    for name in extra:
        if name not in shapes:  # a tied one has one name only
            continue
        for part, shape in names.file_shapes(name, shapes[name]).items():
            key = PREFIX + part.name
            of_base = not saved.fields and ".pooler." in part.name  # which peft does not train
            if key in saved.shapes or not of_base:
                found[key] = FileTensor(name, shape, part=part)
    return found


def _tied(saved: SavedAdapter, names: FileNames, wanted: Collection[str]) -> set[str]:
    """Further names in the file of parameters that the model holds as one.

    Raises:
        ModelError: the file has the parameter under one name only, or another value under each: peft has untied it.
    """
    known = set()
    for alias, first in names.ties().items():
        if PREFIX + first not in wanted or PREFIX + first not in saved.shapes:
            continue
        if PREFIX + alias in saved.shapes:
            same = torch.equal(saved.tensor(PREFIX + alias), saved.tensor(PREFIX + first))
            known.add(PREFIX + alias)
        else:
            same = bool(saved.values.get("ensure_weight_tying"))
        if not same:
            raise ModelError(
                f"{saved.folder}: {first} was trained apart from {alias}, and the base has them as one weight",
                hint="save the base with tie_word_embeddings=false and both weights, and load the adapters into that",
            )
    return known


def _refuse_other_tensors(saved: SavedAdapter, wanted: Collection[str], tied: Collection[str]) -> None:
    missing = [key for key in wanted if key not in saved.shapes]
    unknown = [key for key in saved.shapes if key not in wanted and key not in tied]
    if not missing and not unknown:
        return
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing", missing), ("not of this model", unknown))
        if keys
    ]
    of_head = not missing and all(is_head_tensor(key.removeprefix(PREFIX)) for key in unknown)
    raise ModelError(
        f"{saved.folder}: the adapters do not fit the model ({' | '.join(parts)})",
        hint="they come with the head of a task: give the base that head first (attach_head, save_pretrained)"
        if of_head
        else "rank, method and targets must be those with which they were saved, and the base the same model",
    )
