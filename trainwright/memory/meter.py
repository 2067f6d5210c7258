"""Activations, counted: the tensors that autograd holds for the backward pass, each piece of memory once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from trainwright.memory import selective

__all__ = ["ActivationMeter", "is_parameter", "local_tensor", "storage_bytes", "storage_key"]

# Nodes that change neither what a weight means nor, but for the cast, what it holds.
_SHAPE_NODES = ("TBackward0", "ToCopyBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0")


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain tensor this process holds of `tensor` (a DTensor's shard, else itself)."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_key(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor while it lives: views of one piece of memory share it."""
    return local_tensor(tensor).untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind tensors, each piece once; of a DTensor what this process holds."""
    return sum({storage_key(tensor): local_tensor(tensor).untyped_storage().nbytes() for tensor in tensors}.values())


def is_parameter(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter or a view of one.

    FSDP2 gathers parameters into fresh memory; what is saved is a view of that, known by its base.
    """
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter)


class _Saved:
    """One tensor that autograd holds; a class of its own so that the meter can watch it without keeping it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class ActivationMeter:
    """Counts what the forward passes inside its `with` save for backward.

    Attributes, in bytes, as of now, during and after the `with`:
        activations: held for backward, parameters and buffers excluded. What an offload moved away is not in it; what
            selective recomputing keeps is.
        weight_copies: low-precision copies of parameters that autocast made and backward holds. Those inside compiled
            code cannot be told from activations and count as these.

    A tensor saved twice, or two views of one piece of memory, count once. Results that compiled selective recomputing
    keeps are ordinary saved tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._activations: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._copies: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks: Any = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> ActivationMeter:
        self._hooks.__enter__()
        selective.observers.append(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        selective.observers.remove(self._keep)
        self._hooks.__exit__(kind, error, traceback)

    @property
    def activations(self) -> int:
        pieces = {key: size for key, (reference, size) in self._kept.items() if not reference.expired()}
        for saved in self._activations:
            pieces[storage_key(saved.tensor)] = local_tensor(saved.tensor).untyped_storage().nbytes()
        return sum(pieces.values())

    @property
    def weight_copies(self) -> int:
        return storage_bytes(saved.tensor for saved in self._copies)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if is_parameter(tensor) or storage_key(tensor) in self._known:
            return saved
        (self._copies if _is_weight_copy(tensor) else self._activations).add(saved)
        return saved

    def _keep(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = local_tensor(tensor).untyped_storage()
                self._kept[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def _is_weight_copy(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter seen through casts and transposes only."""
    node = tensor.grad_fn
    while node is not None and node.name() in _SHAPE_NODES:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)  # of the node that adds up a leaf's gradient
