"""A model folder again, with weights of another type or in files of another size; whatever model it is.

Tensors are read and written some rows at a time. Everything else of the folder (tokenizer, templates, task) is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.base.safetensors_file import INDEX_NAME, StoredTensor, write_folder
from trainwright.models.importing import load_config, read_json, weight_files
from trainwright.models.registry import family_of

__all__ = ["rewrite_folder"]

PIECE_BYTES = 64 << 20


def rewrite_folder(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Copy a Hugging Face folder to `destination`, which is empty or does not exist, with its weights written anew.

    Args:
        dtype: of floating-point weights; None keeps that of each. Weights that their family computes in fp32 keep it.
        max_shard_bytes: larger models are cut into several files with an index.

    Raises:
        ModelError: no weights as safetensors there, or one has numbers that `dtype` cannot hold.
        OSError: the folder cannot be written.
    """
    source, destination = Path(source), Path(destination)
    files = weight_files(source)
    kept = _kept_in_fp32(source)
    with _Opened(source, files) as opened:
        tensors = [
            StoredTensor(name, _name(_type(stored, None if name.endswith(kept) else dtype)), shape)
            for name, (stored, shape) in opened.facts.items()
        ]
        destination.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.name in {*files, INDEX_NAME}:
                continue
            if path.is_dir():
                shutil.copytree(path, destination / path.name)
            else:
                shutil.copy2(path, destination / path.name)
        write_folder(tensors, opened.read, place=lambda name: destination / name, max_bytes=max_shard_bytes)
    if dtype is not None:
        config = read_json(destination / "config.json")
        named = {"dtype": _name(dtype), "torch_dtype": _name(dtype)}
        text = json.dumps({**config, **named}, indent=2, ensure_ascii=False)
        (destination / "config.json").write_text(text + "\n", encoding="utf-8")
    return destination


def _kept_in_fp32(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(family_of(load_config(folder)).weights.fp32)
    except ModelError:  # a model that is not known here has no such weights that we could name
        return ()


class _Opened:
    """The weight files of a folder, open."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(folder / name, framework="pt") for name in names]
        self._at = {key: file for file in self._files for key in file.offset_keys()}
        self.facts = {key: self._facts(key) for key in self._at}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._at.clear()
        self._files.clear()

    def _facts(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        part = self._at[name].get_slice(name)
        shape = tuple(part.get_shape())
        probe = self._at[name].get_tensor(name) if math.prod(shape) == 0 or not shape else part[:1]
        return probe.dtype, shape

    def read(self, stored: StoredTensor) -> Iterator[memoryview]:
        """The bytes of a tensor in the type in which it is to be stored, some rows at a time."""
        wanted = getattr(torch, stored.dtype)
        if not stored.shape or not math.prod(stored.shape):
            yield _bytes(_cast(self._at[stored.name].get_tensor(stored.name), wanted, stored.name))
            return
        rows = max(1, PIECE_BYTES // max(1, stored.bytes // stored.shape[0]))
        part = self._at[stored.name].get_slice(stored.name)
        for first in range(0, stored.shape[0], rows):
            yield _bytes(_cast(part[first : first + rows], wanted, stored.name))


def _cast(tensor: Tensor, wanted: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(wanted)
    if wanted != tensor.dtype and tensor.is_floating_point() and bool((cast.isinf() & ~tensor.isinf()).any()):
        raise ModelError(f"{name} has numbers up to {float(tensor.abs().max()):.3g}, too large for {_name(wanted)}")
    return cast


def _type(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return view


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
