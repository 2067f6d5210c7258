"""A DeepSpeed checkpoint becomes a folder of safetensors: fp32 weights under their own names, moments beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.base.safetensors_file import DTYPE_CODES, StoredTensor, write_folder
from trainwright.checkpoint.deepspeed_files import LazyTensor, read_deepspeed

__all__ = ["Imported", "import_deepspeed"]

REPORT_NAME = "deepspeed_import.json"


@dataclass(frozen=True)
class Imported:
    """What an import brought over: see `deepspeed_files.DeepSpeedState`. `parameters` counts elements of weights."""

    path: Path
    stage: int
    ranks: int
    parameters: int
    moments: tuple[str, ...]
    notes: tuple[str, ...]


def import_deepspeed(
    folder: Path | str,
    destination: Path | str,
    *,
    tag: str | None = None,
    trust: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Imported:
    """Write `model*.safetensors` (fp32), `optimizer/<moment>/model*.safetensors` and a report into `destination`.

    The files are read as data, one tensor at a time: nothing that they name is called, DeepSpeed is not needed.

    Args:
        folder: what DeepSpeed's save_checkpoint got: it holds the folders of the tags and the file `latest`.
        destination: a folder that does not exist or is empty; it appears when it is complete.
        tag: the checkpoint to take; None takes the latest.
        trust: must be True: who made these files is known. They carry no hashes, and their format is Python's pickle.

    Raises:
        CheckpointError: `trust` is missing; `destination` is in use; or the checkpoint is damaged, incomplete, or
            tensor or pipeline parallel.
    """
    folder, destination = Path(folder), Path(destination)
    if not trust:
        raise CheckpointError(
            f"{folder}: DeepSpeed checkpoints are pickle files without hashes; they are not read unless you say so",
            hint="if you know who made them, repeat with --allow-pickle; they are read as data, nothing of them is run",
        )
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is in use", hint="name a new folder; nothing is overwritten")
    state = read_deepspeed(folder, tag)
    report = {
        "from": str(folder),
        "tag": tag,
        "zero_stage": state.stage,
        "ranks": state.ranks,
        **state.facts,
        "tied": state.tied,
        "moments": sorted(state.moments),
        "notes": state.notes,
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.parent / f".{destination.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _write(temporary, state.weights, max_shard_bytes)
        for name, tensors in state.moments.items():
            inside = temporary / "optimizer" / name
            inside.mkdir(parents=True)
            _write(inside, tensors, max_shard_bytes)
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (temporary / REPORT_NAME).write_text(text, encoding="utf-8")
        os.rename(temporary, destination)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise
    count = sum(torch.Size(tensor.shape).numel() for tensor in state.weights.values())
    moments = tuple(sorted(state.moments))
    return Imported(destination, state.stage, state.ranks, count, moments, tuple(state.notes))


def _write(folder: Path, tensors: Mapping[str, LazyTensor], max_bytes: int) -> None:
    stored = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPE_CODES:
            raise CheckpointError(f"tensor {name!r}: {dtype} has no place in a safetensors file")
        stored.append(StoredTensor(name, dtype, tensor.shape))

    def read(entry: StoredTensor) -> Iterator[memoryview]:
        values: Any = tensors[entry.name].read().contiguous()
        yield values.view(-1).view(torch.uint8).numpy().data

    write_folder(stored, read, place=lambda name: folder / name, max_bytes=max_bytes)
