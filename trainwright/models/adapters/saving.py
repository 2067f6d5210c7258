"""Adapters as files of peft: adapter_config.json and adapter_model.safetensors.

Every file is written beside its final name and synced before it gets that name; the configuration comes last, so that a
folder that has one is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.base.safetensors_file import DTYPE_CODES, StoredTensor, write_folder
from trainwright.models.adapters.apply import AdapterReport, adapter_report
from trainwright.models.adapters.held import sample_of_base
from trainwright.models.adapters.linear import ADAPTER_LEAVES
from trainwright.models.adapters.names import PREFIX, FileNames, FileTensor
from trainwright.models.exporting import WeightSource
from trainwright.models.fields import config_fields
from trainwright.models.weights import kept_tensors

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "MODEL_FIELDS", "save_adapter", "source_of"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_FIELDS = "trainwright_model.json"
"""Beside the files of peft: the model that the adapters stand in, with its task's head, how its weights were held while
they were trained with a few numbers of them, and what ends the texts that it writes."""

_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS", "embedding": "FEATURE_EXTRACTION"}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    source: WeightSource | None = None,
    base: str | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapters of a model, and what was trained beside them, so that peft opens them; returns the folder.

    Args:
        model: with adapters; it may be divided in any way, or have lost parts of it to other processes.
        source: gives its parameters (`readable_weights`); None reads those of a model that is whole in this process.
        base: the folder or name of the model that the adapters belong to; it is written into the configuration.
        generation: keys that generation_config.json of the merged model gets (`eos_token_id` of what was trained, say).
        dtype: of the written tensors; None keeps each as it is.

    Raises:
        ModelError: the model has no adapters. OSError: the folder cannot be written.
    """
    report = adapter_report(model)
    if report is None:
        raise ModelError(f"{type(model).__name__} has no adapters to save", hint="use save_pretrained")
    source = source or source_of(model)
    config: Any = getattr(model, "config", None)
    names = FileNames(config if hasattr(config, "family") else None)
    wanted = _wanted(report, names, source)
    stored = [
        StoredTensor(file_name, _code(piece.name, dtype or source.dtypes[piece.name]), piece.shape)
        for file_name, piece in wanted.items()
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f".{ADAPTER_WEIGHTS}.tmp", folder / f".{ADAPTER_CONFIG}.tmp"
    weights.unlink(missing_ok=True)
    write_folder(
        stored,
        lambda tensor: _bytes(names, source, wanted[tensor.name], tensor),
        place=lambda _: weights,
        max_bytes=1 << 62,
    )
    whole = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name, piece in wanted.items() if piece.part})
    document = _configuration(report, names, base, _task_type(model), whole)
    text.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(text)
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)  # of other weights than those that come now
    if hasattr(config, "family"):
        sample = sample_of_base(report, names, source)
        fields = {"model": config_fields(config), "base": report.options.base, "base_sample": sample}
        if generation:
            fields["generation"] = dict(generation)
        (folder / MODEL_FIELDS).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(folder / MODEL_FIELDS)
    os.replace(weights, folder / ADAPTER_WEIGHTS)
    os.replace(text, folder / ADAPTER_CONFIG)
    _sync(folder)
    return folder


def source_of(model: nn.Module, prefix: str = "") -> WeightSource:
    """The parameters and kept buffers of a module that is whole in this process; their names begin with `prefix`."""
    tensors = {f"{prefix}{name}": value for name, value in kept_tensors(model).items()}
    return WeightSource(
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: value.dtype for name, value in tensors.items()},
        lambda name, first, rows: tensors[name].detach().narrow(0, first, rows),
    )


def _wanted(report: AdapterReport, names: FileNames, source: WeightSource) -> dict[str, FileTensor]:
    """By name in the file, in the order of the model."""
    found = {}
    for module, linear in report.linears.items():
        shape = (linear.out_features, linear.in_features)
        for leaf in ADAPTER_LEAVES:
            ours = f"{module}.{leaf}"
            if ours in source.shapes:
                found[names.tensor(module, shape, leaf)] = FileTensor(ours, source.shapes[ours], (module, shape))
    for ours in report.extra:
        shape_of_all = source.shapes.get(ours)
        if shape_of_all is None:  # a tied one has one name only
            continue
        for part, shape_in_file in names.file_shapes(ours, shape_of_all).items():
            found[PREFIX + part.name] = FileTensor(ours, shape_in_file, part=part)
    for alias, first in names.ties().items():
        if PREFIX + first in found:
            found[PREFIX + alias] = found[PREFIX + first]
    return found


def _code(name: str, dtype: torch.dtype) -> str:
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPE_CODES:
        raise ModelError(f"cannot save {name}: {text} has no place in a safetensors file")
    return text


def _bytes(names: FileNames, source: WeightSource, piece: FileTensor, stored: StoredTensor) -> Iterator[memoryview]:
    shape = source.shapes[piece.name]
    if piece.linear is not None:
        leaf = piece.name.rpartition(".")[2]
        value = names.to_file(*piece.linear, leaf, source.read(piece.name, 0, shape[0]))
    else:
        assert piece.part is not None
        row = piece.part.row
        whole = source.read(piece.name, 0, shape[0] if shape else 1) if row is None else source.read(piece.name, row, 1)
        value = names.part_to_file(piece.part, whole if row is None else whole[0])
    yield _view(value.to("cpu", getattr(torch, stored.dtype)))


def _view(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _task_type(model: nn.Module) -> str | None:
    """What peft calls the task of the model; None where it has no name for it (masked language models)."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "family"):
        return None
    if config.head is not None:
        return _TASKS.get(config.head.kind)
    kind = config.kind if config.family == "transformers" else "masked_lm" if config.family == "bert" else "causal_lm"
    return {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(kind)


def _configuration(
    report: AdapterReport, names: FileNames, base: str | None, task: str | None, whole: list[str]
) -> dict[str, Any]:
    """adapter_config.json. whole: modules, as files name them, that are trained as they are."""
    options = report.options
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in report.linears.items()}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": int(options.alpha) if float(options.alpha).is_integer() else options.alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.name == "rslora",
        "use_dora": options.name == "dora",
        "target_modules": [names.module(name, shape) for name, shape in shapes.items()],
        "fan_in_fan_out": any(names.transposed(name, shape) for name, shape in shapes.items()),
        "modules_to_save": whole or None,
        "bias": "none",
        "init_lora_weights": True,
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
