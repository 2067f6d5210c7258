"""The manifest: one JSON file that says everything about a checkpoint, and the checks it must pass to be believed.

The format is specified in docs/checkpoints.md. A manifest is refused unless every field has its type, every limit
holds, its own hash is right, the chunks tile every tensor exactly and no byte of a file belongs to two of them. What
passes here can be read without further thought: no size in it is larger than the files that stand behind it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.storage import hash_bytes
from trainwright.checkpoint.tree import Json, tensor_names

__all__ = [
    "DTYPE_BYTES",
    "FORMAT",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "SCHEMA",
    "ChunkEntry",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "check_coverage",
    "data_file_name",
    "encode_manifest",
    "parse_manifest",
]

FORMAT = "trainwright.checkpoint"
SCHEMA = 1
MANIFEST_NAME = "manifest.json"

MAX_MANIFEST_BYTES = 512 << 20
MAX_TENSORS = 4_000_000
MAX_DIMENSIONS = 32
MAX_EXTENT = 1 << 48
MAX_STEP = 10**18
MAX_GAP = 4096
"""Padding between chunks aligns them to 64 or 4096 bytes; a larger hole would be a place to hide something."""

DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Names of dtypes as torch writes them, and bytes per element."""

_FILE_NAME = re.compile(r"data-[0-9]{5,7}-[0-9]{3,6}\.bin")
_HASH = re.compile(r"[0-9a-f]{32}")
_SELF_HASH_HEAD = b'{"self_hash":"'
_NO_HASH = b"0" * 32


def data_file_name(rank: int, index: int) -> str:
    """Name of the index-th data file that a rank writes."""
    return f"data-{rank:05d}-{index:03d}.bin"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data file: its size in bytes and the xxh3_128 of all of it."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A box of a tensor, row-major, as `bytes` bytes from `at` on in `file`; `offset` and `shape` are its box."""

    file: str
    at: int
    bytes: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A whole tensor: dtype name, GLOBAL shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed checkpoint. `created` is in seconds since the epoch; `meta` and `state` are trees of tree.py."""

    step: int
    created: float
    versions: dict[str, str]
    world_size: int
    meta: Json
    state: Json
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def bytes(self) -> int:
        """Bytes of all data files."""
        return sum(entry.bytes for entry in self.files.values())


# --- writing --------------------------------------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Their own hash is computed over the file with the hash written as zeros."""
    record = {
        "self_hash": _NO_HASH.decode(),
        "format": FORMAT,
        "schema": SCHEMA,
        "step": manifest.step,
        "created": manifest.created,
        "versions": manifest.versions,
        "world_size": manifest.world_size,
        "meta": manifest.meta,
        "state": manifest.state,
        "files": {name: {"bytes": e.bytes, "xxh3_128": e.xxh3_128} for name, e in manifest.files.items()},
        "tensors": {
            name: {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "chunks": [
                    {
                        "file": chunk.file,
                        "at": chunk.at,
                        "bytes": chunk.bytes,
                        "offset": list(chunk.offset),
                        "shape": list(chunk.shape),
                        "xxh3_128": chunk.xxh3_128,
                    }
                    for chunk in entry.chunks
                ],
            }
            for name, entry in manifest.tensors.items()
        },
    }
    data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    return _SELF_HASH_HEAD + hash_bytes(data).encode("ascii") + data[len(_SELF_HASH_HEAD) + 32 :]


# --- reading --------------------------------------------------------------------------------------------------------


def parse_manifest(data: bytes) -> Manifest:
    """Read and check the bytes of manifest.json.

    Raises:
        CheckpointError: anything about it is not as `encode_manifest` writes it, with the field and the reason.
    """
    _check_self_hash(data)
    try:
        record = json.loads(
            data.decode("ascii"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON, bad UTF-8 and endless integers
        raise _bad(f"cannot be read as JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _bad(f"it does not say that its format is {FORMAT!r}")
    if record.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{MANIFEST_NAME}: it has schema version {str(record.get('schema'))[:20]}; "
            f"this version of trainwright reads {SCHEMA}",
            hint="use the version of trainwright that wrote it (see `versions` in the manifest)",
        )
    fields = _fields(record, _MANIFEST_FIELDS, "manifest")
    manifest = Manifest(
        step=_integer(fields["step"], "step", MAX_STEP),
        created=_created(fields["created"]),
        versions=_versions(fields["versions"]),
        world_size=_integer(fields["world_size"], "world_size", 10**7),
        meta=fields["meta"],
        state=fields["state"],
        files={_file_name(name): _file(value, name) for name, value in _mapping(fields["files"], "files").items()},
        tensors={name: _tensor(value, name) for name, value in _mapping(fields["tensors"], "tensors").items()},
    )
    _check_trees(manifest)
    check_coverage(manifest)
    return manifest


_MANIFEST_FIELDS = (
    "self_hash",
    "format",
    "schema",
    "step",
    "created",
    "versions",
    "world_size",
    "meta",
    "state",
    "files",
    "tensors",
)


def _bad(reason: str) -> CheckpointError:
    return CheckpointError(f"{MANIFEST_NAME}: {reason}")


def _check_self_hash(data: bytes) -> None:
    start, end = len(_SELF_HASH_HEAD), len(_SELF_HASH_HEAD) + 32
    stated = data[start:end]
    if not data.startswith(_SELF_HASH_HEAD) or not _HASH.fullmatch(stated.decode("latin-1")):
        raise _bad(f"it does not begin with its own hash, so it is not a manifest (first bytes: {data[:24]!r})")
    actual = hash_bytes(data[:start] + _NO_HASH + data[end:])
    if actual != stated.decode("ascii"):
        raise _bad(f"its content was changed: it states the hash {stated.decode('ascii')}, its bytes have {actual}")


def _without_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} stands there twice")
    return result


def _refuse_constant(text: str) -> Json:
    raise ValueError(f"{text} is not JSON")


def _fields(value: Json, names: Sequence[str], where: str) -> dict[str, Json]:
    """A JSON object with exactly these fields: a field that we do not know could change the meaning of the others."""
    if not isinstance(value, dict) or value.keys() != set(names):
        seen = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise _bad(f"{where}: expected the fields {', '.join(names)}; found {str(seen)[:300]}")
    return value


def _mapping(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict) or len(value) > MAX_TENSORS:
        raise _bad(f"{where}: expected an object with at most {MAX_TENSORS} names")
    return value


def _integer(value: Json, where: str, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise _bad(f"{where}: expected a whole number from 0 to {limit}, found {str(value)[:60]}")
    return value


def _integers(value: Json, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise _bad(f"{where}: expected a list of at most {MAX_DIMENSIONS} whole numbers")
    return tuple(_integer(item, where, MAX_EXTENT) for item in value)


def _hash(value: Json, where: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise _bad(f"{where}: expected 32 hexadecimal digits, found {str(value)[:60]!r}")
    return value


def _created(value: Json) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e12:
        raise _bad(f"created: expected seconds since the epoch, found {str(value)[:60]}")
    return float(value)


def _versions(value: Json) -> dict[str, str]:
    mapping = _mapping(value, "versions")
    if len(mapping) > 64 or not all(isinstance(text, str) and len(text) <= 256 for text in mapping.values()):
        raise _bad("versions: expected at most 64 short texts")
    return mapping


def _file_name(name: str) -> str:
    """Only names that we make ourselves: no separator, no dots to climb with, nothing absolute."""
    if not _FILE_NAME.fullmatch(name):
        raise _bad(f"files: {name[:80]!r} is not the name of a data file (data-RANK-INDEX.bin)")
    return name


def _file(value: Json, name: str) -> FileEntry:
    fields = _fields(value, ("bytes", "xxh3_128"), f"files/{name}")
    return FileEntry(_integer(fields["bytes"], f"files/{name}/bytes", MAX_EXTENT), _hash(fields["xxh3_128"], name))


def _tensor(value: Json, name: str) -> TensorEntry:
    where = f"tensor {name[:200]!r}"
    fields = _fields(value, ("dtype", "shape", "chunks"), where)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPE_BYTES:
        raise _bad(f"{where}: unknown dtype {str(fields['dtype'])[:60]!r}")
    if not isinstance(fields["chunks"], list):
        raise _bad(f"{where}: chunks: expected a list")
    shape = _integers(fields["shape"], f"{where}: shape")
    return TensorEntry(fields["dtype"], shape, tuple(_chunk(chunk, where) for chunk in fields["chunks"]))


def _chunk(value: Json, where: str) -> ChunkEntry:
    fields = _fields(value, ("file", "at", "bytes", "offset", "shape", "xxh3_128"), f"{where}: chunk")
    if not isinstance(fields["file"], str):
        raise _bad(f"{where}: chunk: file: expected a name")
    return ChunkEntry(
        file=_file_name(fields["file"]),
        at=_integer(fields["at"], f"{where}: chunk: at", MAX_EXTENT),
        bytes=_integer(fields["bytes"], f"{where}: chunk: bytes", MAX_EXTENT),
        offset=_integers(fields["offset"], f"{where}: chunk: offset"),
        shape=_integers(fields["shape"], f"{where}: chunk: shape"),
        xxh3_128=_hash(fields["xxh3_128"], f"{where}: chunk"),
    )


def _check_trees(manifest: Manifest) -> None:
    """The state must use every stored tensor and no other, and meta none at all."""
    if tensor_names(manifest.meta, what="meta") or not isinstance(manifest.meta, dict):
        raise _bad("meta: expected an object without tensors")
    used = tensor_names(manifest.state)
    if used != manifest.tensors.keys():
        odd = sorted(used ^ manifest.tensors.keys())[:5]
        raise _bad(f"state and tensors do not name the same tensors: {', '.join(map(repr, odd))}")
    if not isinstance(manifest.state, dict):
        raise _bad("state: expected an object")


# --- coverage -------------------------------------------------------------------------------------------------------


def check_coverage(manifest: Manifest) -> None:
    """Chunks tile every tensor exactly, and the files hold the chunks and nothing else but short padding.

    Raises:
        CheckpointError: a hole, an overlap, a chunk outside its tensor or file, with the tensor's name.
    """
    by_file: dict[str, list[tuple[int, int, str]]] = {name: [] for name in manifest.files}
    for name, entry in manifest.tensors.items():
        where = f"tensor {name[:200]!r}"
        for chunk in entry.chunks:
            _check_chunk(chunk, entry, where)
            if chunk.file not in by_file:
                raise _bad(f"{where}: chunk in {chunk.file}, which is not among the files")
            by_file[chunk.file].append((chunk.at, chunk.at + chunk.bytes, name))
        if sum(chunk.bytes for chunk in entry.chunks) != entry.bytes:
            stored = sum(chunk.bytes for chunk in entry.chunks)
            raise _bad(f"{where}: its chunks hold {stored} bytes, its shape and dtype need {entry.bytes}")
        _check_no_overlap(entry.chunks, where)
    for file, spans in by_file.items():
        _check_spans(file, manifest.files[file].bytes, sorted(spans))


def _check_chunk(chunk: ChunkEntry, entry: TensorEntry, where: str) -> None:
    if not len(chunk.shape) == len(chunk.offset) == len(entry.shape):
        raise _bad(f"{where}: a chunk has another number of dimensions than the tensor")
    inside = all(o + s <= whole and s > 0 for o, s, whole in zip(chunk.offset, chunk.shape, entry.shape, strict=True))
    if not inside:
        raise _bad(f"{where}: the chunk at {list(chunk.offset)} of shape {list(chunk.shape)} is empty or not inside it")
    if math.prod(chunk.shape) * DTYPE_BYTES[entry.dtype] != chunk.bytes:
        raise _bad(f"{where}: the chunk at {list(chunk.offset)} does not have the bytes that its shape needs")


def _check_no_overlap(chunks: Iterable[ChunkEntry], where: str) -> None:
    """A sweep along the first dimension: only boxes that are open at the same row are compared."""
    open_boxes: list[ChunkEntry] = []
    for chunk in sorted(chunks, key=lambda c: c.offset):
        if chunk.offset:
            open_boxes = [box for box in open_boxes if box.offset[0] + box.shape[0] > chunk.offset[0]]
        for box in open_boxes:
            if _overlap(box, chunk):
                raise _bad(f"{where}: the chunks at {list(box.offset)} and {list(chunk.offset)} overlap")
        open_boxes.append(chunk)


def _overlap(one: ChunkEntry, other: ChunkEntry) -> bool:
    spans = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    return all(a < b + b_extent and b < a + a_extent for a, a_extent, b, b_extent in spans)


def _check_spans(file: str, size: int, spans: list[tuple[int, int, str]]) -> None:
    end = 0
    for start, stop, name in [*spans, (size, size, "the end of the file")]:
        if start < end:
            raise _bad(f"{file}: {name[:200]!r} overlaps what stands before it, or does not fit into the file")
        if start - end >= MAX_GAP:
            raise _bad(f"{file}: {start - end} bytes before {name[:200]!r} belong to no tensor")
        end = stop
