"""A checkpoint of any number of ranks becomes a Hugging Face folder without the model ever being in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import CheckpointReader
from trainwright.checkpoint.tensors import torch_dtype
from trainwright.inference.adapter_checkpoints import adapters_in, frozen_values
from trainwright.models import build_model, kept_tensors
from trainwright.models.adapters import merged_source
from trainwright.models.exporting import WeightSource, save_weights
from trainwright.models.fields import config_from_fields
from trainwright.models.registry import ModelConfig

__all__ = ["export_checkpoint"]


def export_checkpoint(
    checkpoint: Path | str,
    destination: Path | str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    generation: Mapping[str, Any] | None = None,
    add: Callable[[Path], object] | None = None,
) -> Path:
    """Write the model of a checkpoint as safetensors with config.json; averaged weights where there are any, and
    adapters merged into the weights that they stand beside.

    Reads, checks and writes a piece of one tensor at a time (a whole one where the file has it transposed or in another
    order, or where it is read from the base of adapters). Everything goes into a folder beside `destination`, which
    gets its name when it is complete.

    Args:
        checkpoint: a `step-N` folder, whatever the layout that saved it.
        destination: a folder that does not exist or is empty.
        max_shard_bytes: larger models are cut into several files with an index.
        dtype: of the written weights; None keeps that of the stored ones.
        generation: extra keys of generation_config.json.
        add: called with the folder before it gets its name, for what shall lie beside the weights (the tokenizer).

    Raises:
        CheckpointError: the checkpoint is damaged, or holds no model or not all of its weights; the model that its
            adapters stand beside is not there any more; or `destination` is in use.
        OSError: the folder cannot be written. Nothing of it is left.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is in use", hint="name a new folder; nothing is overwritten")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with CheckpointReader(checkpoint) as reader:
        config, source = _model_in(reader)
        folder = destination.parent / f".{destination.name}.tmp-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            if add is not None:
                add(folder)
            save_weights(config, source, folder, generation=generation, dtype=dtype, max_shard_bytes=max_shard_bytes)
            os.rename(folder, destination)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
            raise
    return destination


def _model_in(reader: CheckpointReader) -> tuple[ModelConfig, WeightSource]:
    """The configuration in a checkpoint, and its weights as they can be read."""
    names = reader.state_with({name: name for name in reader.manifest.tensors})  # the state with names for tensors
    try:
        config, stored = config_from_fields(reader.meta["model"]), dict(names["engine"]["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.path} holds no model ({error.args[0]!r} is missing)") from error
    trained = {name: torch_dtype(reader.manifest.tensors[at].dtype) for name, at in stored.items()}
    model = build_model(config, device="meta", dtype=next(iter(trained.values()), torch.float32))
    report = adapters_in(reader.meta, stored, model, reader.path)
    frozen = frozen_values(reader.meta, report, config, reader.path)
    averages = names["engine"].get("ema", {}).get("averages", {})
    stored.update({name: at for name, at in averages.items() if report is None or not report.is_frozen(name)})
    shapes, dtypes = {}, {}
    for name, parameter in kept_tensors(model).items():
        entry = reader.manifest.tensors.get(str(stored.get(name)))
        of_base = name not in stored and frozen is not None and report is not None and report.is_frozen(name)
        if not of_base and (entry is None or entry.shape != tuple(parameter.shape)):
            raise CheckpointError(f"{reader.path}: {name} is missing or not of shape {list(parameter.shape)}")
        shapes[name] = tuple(parameter.shape)
        # Averages are kept in float32; they are exported as what they are averages of.
        dtypes[name] = trained.get(name, parameter.dtype)
    last: dict[str, torch.Tensor] = {}

    def read(name: str, first: int, rows: int) -> torch.Tensor:
        if name in stored:
            shape = shapes[name]
            return reader.read_box(stored[name], (first, *(0 for _ in shape[1:])), (rows, *shape[1:]))
        if name not in last:
            assert frozen is not None
            last.clear()
            last[name] = frozen(name, shapes[name], dtypes[name])
        return last[name][first : first + rows] if shapes[name] else last[name]

    source = WeightSource(shapes, dtypes, read)
    return config, source if report is None else merged_source(report, source)
