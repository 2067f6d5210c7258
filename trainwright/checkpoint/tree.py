"""A tree of state (nested dicts and lists with tensors and JSON values) as plain JSON and a table of named tensors.

`unflatten(flatten(state))` gives back exactly the state, types included: integer keys (torch optimizers have them),
tuples, NaN and infinities are written as small tagged objects, everything else as the JSON that one expects. Objects of
any other type are refused by the path at which they stand: a format that cannot name code cannot run code.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainwright.base.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_DEPTH",
    "FlatState",
    "Json",
    "Leaves",
    "flatten",
    "leaves_of",
    "plain_tree",
    "structure_of",
    "tensor_names",
    "tensor_paths",
    "unflatten",
    "with_names",
]

Json = Any
"""What the json module reads and writes: None, bool, int, float, str, list, dict with string keys."""

MAX_DEPTH = 64
"""Deepest nesting, on both sides: far above any real state, far below what exhausts the stack."""

MAX_NAME = 4096
TAG = "$"
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class FlatState:
    """`tree` is JSON in which each tensor is {"$": "tensor", "name": ...}; `tensors` holds each distinct one once."""

    tree: Json
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Leaves:
    """A state with each tensor under its own path, and what is known of tensors that share memory.

    Attributes:
        tree: as in FlatState, but every tensor is named by its own path.
        tensors: path -> tensor.
        same: path -> the first path with the same memory (its own, where it stands alone). Sharded tensors whose part
            on this rank is empty are missing: here nobody can tell.
    """

    tree: Json
    tensors: dict[str, torch.Tensor]
    same: dict[str, str]


def flatten(state: Mapping[str, Any], *, what: str = "state") -> FlatState:
    """Split a state into JSON and named tensors; tensors that are the same memory are stored once.

    A tensor's name is its path: keys joined by "/", list positions and integer keys in brackets
    (`optimizer/state/[0]/exp_avg`).

    Raises:
        CheckpointError: a value of a type that has no place in a checkpoint, with its path.
    """
    leaves = leaves_of(state, what=what)
    kept = {path: tensor for path, tensor in leaves.tensors.items() if leaves.same.get(path, path) == path}
    return FlatState(with_names(leaves.tree, leaves.same), kept)


def leaves_of(state: Mapping[str, Any], *, what: str = "state") -> Leaves:
    """`flatten`, with tensors that share memory kept apart: which of them do is for all ranks together to say.

    Raises:
        CheckpointError: a value of a type that has no place in a checkpoint, with its path.
    """
    writer = _Flattener(what)
    return Leaves(writer.encode(state, ()), writer.tensors, writer.same)


def with_names(tree: Json, names: Mapping[str, str]) -> Json:
    """The tree with tensors renamed; a name that is not in `names` stays."""
    if isinstance(tree, list):
        return [with_names(item, names) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get(TAG) == "tensor":
        return {TAG: "tensor", "name": names.get(tree["name"], tree["name"])}
    return {key: with_names(item, names) for key, item in tree.items()}


def plain_tree(values: Mapping[str, Any], *, what: str = "meta") -> Json:
    """The JSON of a tree that may not hold tensors.

    Raises:
        CheckpointError: it holds a tensor, or a type that has no place in a checkpoint.
    """
    flat = flatten(values, what=what)
    if flat.tensors:
        raise CheckpointError(f"{what}/{next(iter(flat.tensors))}: tensors belong into the state, not into {what}")
    return flat.tree


class _Flattener:
    def __init__(self, what: str) -> None:
        import torch

        self.what = what
        self.tensors: dict[str, torch.Tensor] = {}
        self.same: dict[str, str] = {}
        self._first: dict[tuple[Any, ...], str] = {}
        sharded = sys.modules.get("torch.distributed.tensor")  # where it was never imported, there is no DTensor
        more = (sharded.DTensor,) if sharded is not None else ()
        self._tensor_types = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, *more)

    def encode(self, value: Any, path: tuple[str | int, ...]) -> Json:
        if len(path) > MAX_DEPTH:
            raise self._refused(path, f"nested deeper than {MAX_DEPTH} levels, or in a circle")
        # Exact types: a subclass (an enum, a numpy scalar, a named tuple) would come back as something else.
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {TAG: "float", "value": str(value)}
        if kind in (dict, OrderedDict):
            return self._encode_dict(value, path)
        if kind is list:
            return [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        if kind is tuple:
            return {TAG: "tuple", "items": [self.encode(item, (*path, i)) for i, item in enumerate(value)]}
        if kind in self._tensor_types:
            return {TAG: "tensor", "name": self._add_tensor(value.detach(), path)}
        raise self._refused(
            path,
            f"{kind.__module__}.{kind.__qualname__} cannot be saved; a state holds dicts, lists, tuples, tensors, "
            f"None, bool, int, float and str",
        )

    def _encode_dict(self, value: Mapping[Any, Any], path: tuple[str | int, ...]) -> Json:
        items = []
        plain = True
        for key, item in value.items():
            if type(key) not in (str, int):
                raise self._refused(path, f"the key {key!r} is a {type(key).__name__}; keys are str or int")
            plain = plain and type(key) is str and not key.startswith(TAG)
            items.append([key, self.encode(item, (*path, key))])
        return dict(items) if plain else {TAG: "dict", "items": items}

    def _add_tensor(self, tensor: torch.Tensor, path: tuple[str | int, ...]) -> str:
        name = _tensor_name(path)
        if len(name) > MAX_NAME:
            raise self._refused(path, f"the path is longer than {MAX_NAME} characters")
        self.tensors[name] = tensor
        identity = _memory_of(tensor, name)
        if identity is not None:
            self.same[name] = self._first.setdefault(identity, name)
        return name

    def _refused(self, path: tuple[str | int, ...], reason: str) -> CheckpointError:
        shown = _tensor_name(path[:8]) + ("/..." if len(path) > 8 else "")
        return CheckpointError(
            f"{self.what}/{shown}: {reason}", hint="turn it into tensors and plain values in state_dict()"
        )


def _tensor_name(path: tuple[str | int, ...]) -> str:
    """Distinct paths give distinct names: "/" and "~" inside a key are escaped as in JSON pointers (RFC 6901)."""
    parts = []
    for key in path:
        if isinstance(key, int):
            parts.append(f"[{key}]")
        else:
            text = key.replace("~", "~0").replace("/", "~1")
            parts.append("~2" + text[1:] if text.startswith("[") else text)
    return "/".join(parts)


def _memory_of(tensor: torch.Tensor, name: str) -> tuple[Any, ...] | None:
    """What makes two tensors the same bytes in the same order; None for a sharded one that is empty on this rank."""
    import torch

    from trainwright.checkpoint.sharding import is_sharded, local_part

    layout: tuple[Any, ...] = ()
    if is_sharded(tensor):
        whole: Any = tensor
        layout = (tuple(whole.shape), str(whole.placements), whole.device_mesh)
        tensor = local_part(tensor)
        if tensor.numel() == 0 and whole.numel():
            return None
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.numel() == 0:
        return (name,)
    flags = (tensor.is_conj(), tensor.is_neg())
    place = (str(tensor.device), tensor.data_ptr(), tensor.dtype)
    return (*layout, *place, tuple(tensor.shape), tuple(tensor.stride()), *flags)


def unflatten(tree: Json, tensors: Mapping[str, Any], *, what: str = "state") -> Any:
    """The inverse of `flatten`. A name that stands at two places gives the same tensor object twice.

    Raises:
        CheckpointError: the tree is not one that `flatten` makes, or names a tensor that is not in `tensors`.
    """
    return _Unflattener(tensors, what).decode(tree, 0)


def tensor_names(tree: Json, *, what: str = "state") -> set[str]:
    """The names of all tensors that a tree refers to; checks the whole tree on the way."""
    reader = _Unflattener(None, what)
    reader.decode(tree, 0)
    return reader.seen


def tensor_paths(tree: Json) -> dict[str, str]:
    """path -> name of every tensor of a tree that `tensor_names` has checked."""
    return {path: node["name"] for path, node in _walk(tree, ()) if isinstance(node, dict)}


def structure_of(tree: Json) -> list[str]:
    """One line per leaf and empty container, without the values: what must be the same on all ranks."""
    return [f"{path}: {_kind(node)}" for path, node in _walk(tree, ())]


def _kind(node: Json) -> str:
    if isinstance(node, dict):
        return "tensor"
    return node if isinstance(node, str) else "value"


def _walk(tree: Json, path: tuple[str | int, ...]) -> Iterator[tuple[str, Json]]:
    """(path, node) of every leaf: a tensor's node, None for a value, and a word for a container without tensors."""
    tag = tree.get(TAG) if isinstance(tree, dict) else None
    if tag == "tensor":
        yield _tensor_name(path), tree
    elif isinstance(tree, list) or tag in ("tuple", "dict"):
        items = tree if isinstance(tree, list) else tree["items"]
        pairs = items if tag == "dict" else list(enumerate(items))
        if not any(isinstance(item, (dict, list)) for _, item in pairs) and tag != "dict":
            yield _tensor_name(path), f"{tag or 'list'} of {len(pairs)} values"
            return
        for key, item in pairs:
            yield from _walk(item, (*path, key))
    elif isinstance(tree, dict) and tag is None:
        if not tree:
            yield _tensor_name(path), "empty dict"
        for key, item in tree.items():
            yield from _walk(item, (*path, key))
    else:
        yield _tensor_name(path), None


class _Unflattener:
    def __init__(self, tensors: Mapping[str, Any] | None, what: str) -> None:
        self.tensors = tensors
        self.what = what
        self.seen: set[str] = set()

    def decode(self, node: Json, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH + 2:  # a tagged container takes two levels of JSON
            raise CheckpointError(f"{self.what}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if isinstance(node, dict):
            if TAG in node:
                return self._decode_tagged(node, depth)
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        if isinstance(node, float) and not math.isfinite(node):
            raise CheckpointError(f"{self.what}: a number that JSON cannot hold")
        return node

    def _decode_tagged(self, node: dict[str, Json], depth: int) -> Any:
        match node:
            case {"$": "float", "value": str(text), **rest} if text in _SPECIAL_FLOATS and not rest:
                return _SPECIAL_FLOATS[text]
            case {"$": "tuple", "items": list(items), **rest} if not rest:
                return tuple(self.decode(item, depth + 2) for item in items)
            case {"$": "dict", "items": list(items), **rest} if not rest:
                return self._decode_items(items, depth)
            case {"$": "tensor", "name": str(name), **rest} if not rest:
                self.seen.add(name)
                if self.tensors is None:
                    return None
                if name not in self.tensors:
                    raise CheckpointError(f"{self.what}: refers to the tensor {name!r}, which is not stored")
                return self.tensors[name]
        raise CheckpointError(f"{self.what}: not a value of this format: {str(node)[:120]}")

    def _decode_items(self, items: list[Json], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for item in items:
            if not (isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)):
                raise CheckpointError(f"{self.what}: not a key and a value: {str(item)[:120]}")
            if item[0] in result:
                raise CheckpointError(f"{self.what}: the key {item[0]!r} stands there twice")
            result[item[0]] = self.decode(item[1], depth + 2)
        return result
