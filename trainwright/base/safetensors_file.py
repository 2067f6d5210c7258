"""Writes safetensors files piece by piece: no tensor, and certainly no model, has to be in memory as a whole.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with the
dtype, shape and byte range of each tensor, then the bytes of the tensors, little-endian, row-major, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DTYPE_CODES", "INDEX_NAME", "StoredTensor", "plan_files", "write_folder"]

INDEX_NAME = "model.safetensors.index.json"

DTYPE_CODES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
"""torch's name of a dtype -> (the name in the file, bytes per element)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its name, torch's name of its dtype, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_CODES[self.dtype][1]


def plan_files(tensors: Sequence[StoredTensor], max_bytes: int) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, in order; each file at most `max_bytes` unless one tensor alone is larger."""
    shards: list[list[StoredTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_folder(
    tensors: Sequence[StoredTensor],
    read: Callable[[StoredTensor], Iterable[memoryview]],
    *,
    place: Callable[[str], Path],
    max_bytes: int,
) -> list[str]:
    """Write `model.safetensors`, or several files and their index; returns the names. All are on the disk then.

    Args:
        read: gives the bytes of a tensor, in order and in pieces of any size; it is called once for each.
        place: where the file of a name is written; there must be none yet.

    Raises:
        ValueError: `read` gave more or fewer bytes than the tensor has.
        OSError: the disk is full or fails.
    """
    files = plan_files(tensors, max_bytes)
    for name, content in files.items():
        _write_file(place(name), content, read)
    if len(files) == 1:
        return list(files)
    weight_map = {tensor.name: name for name, content in files.items() for tensor in content}
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": weight_map}
    with open(place(INDEX_NAME), "x", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return [*files, INDEX_NAME]


def _write_file(
    path: Path, tensors: Sequence[StoredTensor], read: Callable[[StoredTensor], Iterable[memoryview]]
) -> None:
    header = _header(tensors, {"format": "pt"})
    with open(path, "xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(header))
        for tensor in tensors:
            written = 0
            for piece in read(tensor):
                written += len(piece)
                if written > tensor.bytes:
                    break
                _write_all(file.fileno(), piece)
            if written != tensor.bytes:
                raise ValueError(f"{path.name}: tensor {tensor.name!r} has {tensor.bytes} bytes, {written} were given")
        os.fsync(file.fileno())


def _header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    record: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        code = DTYPE_CODES[tensor.dtype][0]
        record[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors then begin at a multiple of 8, so that they can be mapped
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]
