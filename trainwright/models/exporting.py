"""A model becomes a Hugging Face folder that transformers opens and that gives the same logits.

Weights are read and written one tensor, or a few rows of one, at a time: a model that is not in memory (a checkpoint of
many ranks, say) is exported as well as one that is. Every file is written beside its final name, synced to disk, then
renamed: a crash leaves the old file or the new one. The weights come before the configuration and the index, so a
folder that has both is complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.base.faults import fault_point
from trainwright.base.safetensors_file import DTYPE_CODES, INDEX_NAME, StoredTensor, write_folder
from trainwright.models.backbone import Backbone
from trainwright.models.head_files import head_to_hf
from trainwright.models.registry import ModelConfig, family_of
from trainwright.models.weights import kept_tensors

__all__ = ["WeightSource", "save_pretrained", "save_weights"]

PIECE_BYTES = 64 << 20
"""Rows are read and written in pieces of this size where the file has the tensor as the model has it."""


@dataclass(frozen=True)
class WeightSource:
    """Weights that are read on demand.

    Attributes:
        shapes, dtypes: of each parameter, by the model's name of it; the order is that of the files.
        read: (name, first row, rows) -> these rows of it (all dimensions but the first are whole), on any device.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, int, int], Tensor]


def save_pretrained(
    model: Backbone,
    folder: str | Path,
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write config.json, generation_config.json and model*.safetensors; returns the folder.

    generation: extra keys of generation_config.json (`temperature`, `eos_token_id`, ...).
    dtype: of the saved floating-point weights; None keeps each as it is.
    tensors: values to save instead of the model's own, by parameter name (an average of the weights, say).
    max_shard_bytes: larger models are cut into several files with an index.

    Raises:
        ModelError: `tensors` lacks a parameter or has one of another shape.
        OSError: the folder cannot be written.
    """
    values = kept_tensors(model) if tensors is None else _checked(model, tensors)
    source = WeightSource(
        {name: tuple(value.shape) for name, value in values.items()},
        {name: value.dtype for name, value in values.items()},
        lambda name, first, rows: values[name].detach().narrow(0, first, rows),
    )
    return save_weights(
        model.config, source, folder, generation=generation, dtype=dtype, max_shard_bytes=max_shard_bytes
    )


def save_weights(
    config: ModelConfig,
    source: WeightSource,
    folder: str | Path,
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """`save_pretrained` for weights that are read on demand; holds one tensor at most, and usually a piece of one.

    Raises:
        ModelError: a weight is of a dtype that files cannot have. OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = _stored(config, source, dtype)
    places = _places(config, source)
    written: list[str] = []

    def place(name: str) -> Path:
        written.append(name)
        _beside(folder, name).unlink(missing_ok=True)  # of a save that was killed
        return _beside(folder, name)

    try:
        finals = write_folder(
            stored, lambda tensor: _bytes_of(config, source, places, tensor), place=place, max_bytes=max_shard_bytes
        )
        main = next(iter(source.dtypes.values()))
        documents = {"config.json": _config(config, dtype or main)}
        if config.head is None and config.family != "bert":  # what writes text
            documents = {"generation_config.json": _generation(config, generation), **documents}
        for name, document in documents.items():
            _write_json(place(name), document)
            _sync(_beside(folder, name))
            finals.append(name)
        fault_point("model.before_commit")
        for name in finals:
            os.replace(_beside(folder, name), folder / name)
    finally:
        for name in written:
            _beside(folder, name).unlink(missing_ok=True)
    _remove_stale(folder, set(finals))
    _sync(folder)
    return folder


def _beside(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checked(model: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {}
    parameters = dict(model.named_parameters())
    for name, parameter in kept_tensors(model).items():
        if name not in parameters and name not in tensors:  # an average of the weights has none of the buffers
            values[name] = parameter
            continue
        if name not in tensors or tensors[name].shape != parameter.shape:
            seen = list(tensors[name].shape) if name in tensors else "nothing"
            raise ModelError(f"cannot save {name}: got {seen}, expected shape {list(parameter.shape)}")
        values[name] = tensors[name]
    return values


def _stored(config: ModelConfig, source: WeightSource, dtype: torch.dtype | None) -> list[StoredTensor]:
    """What the files hold: the parameters in their layout, and the zeros that the family's files need beside them."""
    weights = family_of(config).weights
    tensors = [
        StoredTensor(
            part.name,
            _code(part.name, _dtype_in_file(source.dtypes[name], None if name.endswith(weights.fp32) else dtype)),
            part_shape,
        )
        for name, shape in source.shapes.items()
        for part, part_shape in weights.file_shapes(config, name, shape).items()
    ]
    main = next(iter(source.dtypes.values()))
    zeros = weights.zeros(config)
    return tensors + [StoredTensor(name, _code(name, dtype or main), shape) for name, shape in zeros.items()]


def _dtype_in_file(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _code(name: str, dtype: torch.dtype) -> str:
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPE_CODES:
        raise ModelError(f"cannot save {name}: {text} has no place in a safetensors file")
    return text


def _places(config: ModelConfig, source: WeightSource) -> dict[str, tuple[str, int | None]]:
    """Which parameter, and which row of it, each tensor of the files is."""
    weights = family_of(config).weights
    return {
        part.name: (name, part.row)
        for name, shape in source.shapes.items()
        for part in weights.placed(config, name, shape)
    }


def _bytes_of(
    config: ModelConfig, source: WeightSource, places: Mapping[str, tuple[str, int | None]], stored: StoredTensor
) -> Iterator[memoryview]:
    """The bytes of a tensor as they stand in the file, piece by piece."""
    dtype = getattr(torch, stored.dtype)
    if stored.name not in places:
        yield _view(torch.zeros(stored.shape, dtype=dtype))
        return
    name, row = places[stored.name]
    shape = source.shapes[name]
    if not math.prod(shape):
        return
    convert = family_of(config).weights.to_file
    if row is not None:
        yield _view(convert(config, stored.name, source.read(name, row, 1)[0]).to("cpu", dtype))
        return
    rows = shape[0]
    probe = torch.empty(shape, dtype=source.dtypes[name], device="meta")
    if convert(config, stored.name, probe) is probe:  # the file has it as it is: rows can go one after the other
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * probe.element_size()))
        for first in range(0, rows, step):
            yield _view(source.read(name, first, min(step, rows - first)).to("cpu", dtype))
        return
    yield _view(convert(config, stored.name, source.read(name, 0, rows)).to("cpu", dtype))


def _view(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    stored = str(dtype).removeprefix("torch.")
    return {**config.to_hf(), **head_to_hf(config), "dtype": stored, "torch_dtype": stored}


def _generation(config: ModelConfig, generation: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {key: config.to_hf().get(key) for key in names}
    known = {key: value for key, value in ids.items() if value is not None}
    return {"_from_model_config": not generation, **known, **(generation or {})}


def _remove_stale(folder: Path, kept: set[str]) -> None:
    """What an earlier save left under other names would be loaded, or waste the disk."""
    for path in (
        *folder.glob("model.safetensors"),
        *folder.glob("model-?????-of-?????.safetensors"),
        folder / INDEX_NAME,
        folder / "generation_config.json",
    ):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
