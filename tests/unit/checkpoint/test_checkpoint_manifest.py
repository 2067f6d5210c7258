"""A manifest is believed only if every check holds; whatever bytes stand in its place, nothing but a refusal comes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import make_state
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.manifest import encode_manifest, parse_manifest
from trainwright.checkpoint.saving import save_checkpoint
from trainwright.checkpoint.storage import hash_bytes

HEAD = b'{"self_hash":"'


def sealed(record: dict[str, Any]) -> bytes:
    """The bytes of a manifest with this content and a correct hash: what an attacker, not an accident, would write."""
    body = {"self_hash": "0" * 32, **{k: v for k, v in record.items() if k != "self_hash"}}
    data = json.dumps(body, separators=(",", ":")).encode()
    return HEAD + hash_bytes(data).encode() + data[len(HEAD) + 32 :]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = save_checkpoint(tmp_path_factory.mktemp("good"), 7, make_state(7), {"loss": 1.5}).path
    return (path / "manifest.json").read_bytes()


def test_encoding_is_the_inverse_of_parsing(good: bytes) -> None:
    assert encode_manifest(parse_manifest(good)) == good
    assert parse_manifest(sealed(json.loads(good))).step == 7


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_is_refused(good: bytes, position: int, bit: int) -> None:
    data = bytearray(good)
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(CheckpointError):
        parse_manifest(bytes(data))


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_any_truncation_is_refused(good: bytes, length: int) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(good[: length % len(good)])


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(data)


def first_tensor(record: dict[str, Any]) -> dict[str, Any]:
    return record["tensors"]["model/embed.weight"]


def first_chunk(record: dict[str, Any]) -> dict[str, Any]:
    return first_tensor(record)["chunks"][0]


def set_in(find: Callable[[dict[str, Any]], dict[str, Any]], **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: find(record).update(values)


def file_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["files"]["data-00000-000.bin"]


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["files"] = {name: file_of(record)}
        for tensor in record["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = name

    return change


def nest(record: dict[str, Any]) -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    record["state"]["deep"] = deep


ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "traversal": rename_file("../outside.bin"),
    "absolute path": rename_file("/etc/passwd"),
    "nested path": rename_file("a/data-00000-000.bin"),
    "pickle file name": rename_file("model.pt"),
    "chunk in unknown file": set_in(first_chunk, file="data-00009-000.bin"),
    "chunk file is a number": set_in(first_chunk, file=3),
    "overlap in the file": set_in(first_chunk, at=64),
    "beyond the end": set_in(first_chunk, at=10**9),
    "negative position": set_in(first_chunk, at=-64),
    "fractional position": set_in(first_chunk, at=0.5),
    "boolean position": set_in(first_chunk, at=True),
    "absurd shape": set_in(first_tensor, shape=[2**40, 2**40]),
    "too many dimensions": set_in(first_tensor, shape=[1] * 1000),
    "endless extent": set_in(first_tensor, shape=[10**30, 40]),
    "negative extent": set_in(first_tensor, shape=[-96, -40]),
    "hole": set_in(first_tensor, shape=[97, 40]),
    "no chunks": set_in(first_tensor, chunks=[]),
    "chunk outside its tensor": set_in(first_chunk, offset=[1, 0]),
    "chunk of other rank": set_in(first_chunk, offset=[0], shape=[3840]),
    "chunk twice": lambda r: first_tensor(r)["chunks"].append(first_chunk(r)),
    "empty chunk": lambda r: first_tensor(r)["chunks"].append({**first_chunk(r), "shape": [0, 40], "bytes": 0}),
    "chunk size lies": set_in(first_chunk, bytes=15356),
    "code as dtype": set_in(first_tensor, dtype="__import__('os')"),
    "dtype is a list": set_in(first_tensor, dtype=["float32"]),
    "dtype drift": set_in(first_tensor, dtype="bfloat16"),
    "hash is no hash": set_in(first_chunk, xxh3_128="x" * 32),
    "file size lies": set_in(file_of, bytes=10**7),
    "hidden bytes": lambda r: file_of(r).update(bytes=file_of(r)["bytes"] + 5000),
    "unknown field": lambda r: r.update(exec="print(1)"),
    "field missing": lambda r: r.pop("files"),
    "other schema": lambda r: r.update(schema=2),
    "schema is a text": lambda r: r.update(schema="1" * 10000),
    "other format": lambda r: r.update(format="pickle"),
    "step is a text": lambda r: r.update(step="7"),
    "step is negative": lambda r: r.update(step=-1),
    "created is a list": lambda r: r.update(created=[]),
    "versions is a list": lambda r: r.update(versions=["torch"]),
    "tensor unknown to the state": lambda r: r["tensors"].update(more={"dtype": "int8", "shape": [0], "chunks": []}),
    "state names a missing tensor": lambda r: r["state"].update(more={"$": "tensor", "name": "nowhere"}),
    "state is a list": lambda r: r.update(state=[]),
    "meta holds a tensor": lambda r: r.update(meta={"a": {"$": "tensor", "name": "model/embed.weight"}}),
    "meta is a text": lambda r: r.update(meta="x"),
    "deep nesting": nest,
    "files is a list": lambda r: r.update(files=[]),
    "tensors is a list": lambda r: r.update(tensors=[]),
    "tensor is a list": lambda r: r["tensors"].update({"model/embed.weight": []}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_lying_manifest_with_a_correct_hash_is_refused(good: bytes, attack: str) -> None:
    record = copy.deepcopy(json.loads(good))
    ATTACKS[attack](record)
    with pytest.raises(CheckpointError, match=r"manifest\.json|state|meta|data-00000-000\.bin"):
        parse_manifest(sealed(record))


@pytest.mark.parametrize(
    "text",
    [
        '"step":NaN',
        '"step":Infinity',
        '"step":' + "9" * 5000,
        '"step":' + "[" * 100_000,
        '"step":7,"step":8',
        '"step":7}x{',
    ],
    ids=["NaN", "Infinity", "endless integer", "endless nesting", "duplicate", "trailing"],
)
def test_json_that_only_some_readers_accept_is_refused(good: bytes, text: str) -> None:
    data = good.replace(b'"step":7', text.encode(), 1)
    data = HEAD + b"0" * 32 + data[len(HEAD) + 32 :]
    data = HEAD + hash_bytes(data).encode() + data[len(HEAD) + 32 :]
    with pytest.raises(CheckpointError, match="JSON"):
        parse_manifest(data)


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_manifest_is_refused_or_says_the_same_of_its_tensors(good: bytes, data: st.DataObject) -> None:
    record = json.loads(good)
    node: Any = record
    while True:  # walk to a random place and put a random value there
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or data.draw(st.booleans()):
            break
        node = child
    node[key] = data.draw(json_values)
    try:
        manifest = parse_manifest(sealed(record))
    except CheckpointError:
        return
    # What is believed is consistent: it can cost no more memory than its files have bytes.
    assert sum(t.bytes for t in manifest.tensors.values()) <= manifest.bytes


def test_a_manifest_on_disk_larger_than_the_limit_is_not_even_read(tmp_path: Path) -> None:
    from trainwright.checkpoint.storage import folder_descriptor, read_small

    (tmp_path / "manifest.json").write_bytes(b"")
    with open(tmp_path / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no space
    with folder_descriptor(tmp_path) as folder, pytest.raises(CheckpointError, match="more than the limit"):
        read_small(folder, "manifest.json", 512 << 20)
