"""A model becomes a Hugging Face folder that transformers opens and that gives the same logits.

Every file is written beside its final name, synced to disk, then renamed: a crash leaves the old file or the new one.
The weights come before the configuration and the index, so a folder that has both is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.base.faults import fault_point
from trainwright.models.decoder import Decoder
from trainwright.models.registry import family_of

__all__ = ["save_pretrained"]

_INDEX = "model.safetensors.index.json"


def save_pretrained(
    model: Decoder,
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(model.named_parameters()) if tensors is None else _checked(model, tensors)
    shards = _plan_shards(model, values, dtype, max_shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    finals = [*names, *([_INDEX] if len(shards) > 1 else []), "generation_config.json", "config.json"]
    try:
        for name, keys in zip(names, shards, strict=True):
            save_file(dict(_file_tensors(model, values, keys, dtype)), _beside(folder, name), metadata={"format": "pt"})
        if len(shards) > 1:
            _write_json(_beside(folder, _INDEX), _index(folder, names, shards))
        _write_json(_beside(folder, "generation_config.json"), _generation(model, generation))
        _write_json(_beside(folder, "config.json"), _config(model, dtype))
        for name in finals:
            _sync(_beside(folder, name))
        fault_point("model.before_commit")
        for name in finals:
            os.replace(_beside(folder, name), folder / name)
    finally:
        for name in finals:
            _beside(folder, name).unlink(missing_ok=True)
    _remove_stale(folder, set(finals))
    _sync(folder)
    return folder


def _beside(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _index(folder: Path, names: list[str], shards: list[list[str]]) -> dict[str, Any]:
    total = sum(_beside(folder, name).stat().st_size for name in names)
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _checked(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {}
    for name, parameter in model.named_parameters():
        if name not in tensors or tensors[name].shape != parameter.shape:
            seen = list(tensors[name].shape) if name in tensors else "nothing"
            raise ModelError(f"cannot save {name}: got {seen}, expected shape {list(parameter.shape)}")
        values[name] = tensors[name]
    return values


def _plan_shards(
    model: Decoder, values: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> list[list[str]]:
    """Names per file, in order, each file at most `max_bytes` unless one tensor alone is larger."""
    zeros = family_of(model.config).weights.zeros(model.config)
    sizes = {name: value.numel() * (dtype or value.dtype).itemsize for name, value in values.items()}
    sizes.update({name: shape[0] * (dtype or torch.float32).itemsize for name, shape in zeros.items()})
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _file_tensors(
    model: Decoder, values: Mapping[str, Tensor], keys: list[str], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    weights = family_of(model.config).weights
    zeros = weights.zeros(model.config)
    for name in keys:
        if name in values:
            tensor = weights.to_file(model.config, name, values[name].detach())
        else:
            tensor = torch.zeros(zeros[name], dtype=model.embedding.weight.dtype)
        yield name, tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()


def _config(model: Decoder, dtype: torch.dtype | None) -> dict[str, Any]:
    stored = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    return {**model.config.to_hf(), "dtype": stored, "torch_dtype": stored}


def _generation(model: Decoder, generation: Mapping[str, Any] | None) -> dict[str, Any]:
    ids = {key: model.config.to_hf()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {key: value for key, value in ids.items() if value is not None}
    return {"_from_model_config": not generation, **known, **(generation or {})}


def _remove_stale(folder: Path, kept: set[str]) -> None:
    """Weights of an earlier save under other names would be loaded, or waste the disk."""
    for path in (*folder.glob("model.safetensors"), *folder.glob("model-?????-of-?????.safetensors"), folder / _INDEX):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
