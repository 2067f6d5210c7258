"""One rank of a world that is not there: real code on tensors without contents, its bytes and messages counted.

`fake_world` starts torch's fake process group (collectives return at once), `without_contents` a mode in which tensors
have shapes and no values, and `Watch` counts what is in memory and what is sent. Together they run one rank of a
cluster of any size in a process that needs neither devices nor memory.

Private names of torch are used in this file only: the fake process group, the fake tensor mode, and the cache of
DTensor's shapes. Stable from 2.11 to 2.13. What goes another way here than on a device: kernels are those of the CPU,
streams do not exist, and compiled code runs uncompiled.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.pipelining import _utils as pipelining_utils
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["Message", "Sent", "Watch", "fake_world", "without_contents"]

_COMM = ("c10d", "_c10d_functional")
_WAITS = ("wait_tensor", "barrier", "monitored_barrier_")


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[dist.ProcessGroup]:
    """Inside, this process is `rank` of `world`; gives the group of all. One after the other in one process."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def without_contents(*, from_meta: bool = False) -> Iterator[FakeTensorMode]:
    """Inside, new tensors have a shape, a type and a device, and no contents.

    from_meta: tensors on the meta device from before may be used as well: for giving a model (unreal) storage.
    """
    # FakeTensors are made of meta tensors and say `is_meta`; FSDP2 then takes them for parameters without storage.
    before = FakeTensor.__dict__.get("is_meta")
    FakeTensor.is_meta = property(lambda self: self.fake_device.type == "meta")  # type: ignore[assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=from_meta) as mode, _shapes_apart(), _without_votes():
            yield mode
    finally:
        if before is None:
            del FakeTensor.is_meta
        else:
            FakeTensor.is_meta = before


@contextlib.contextmanager
def _shapes_apart() -> Iterator[None]:
    """DTensor finds the shape of a result by an operation on fake whole tensors: not in our mode, where they count."""
    ours = ShardingPropagator._propagate_tensor_meta_non_cached

    def apart(self: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return ours(self, schema)

    ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = ours  # type: ignore[method-assign]


@contextlib.contextmanager
def _without_votes() -> Iterator[None]:
    """Stages of a pipeline vote, by a message with contents, on whether their shapes are given. Ours are."""
    schedule = schedules._PipelineSchedule
    votes = schedule.__dict__.get("_warmup_p2p")

    def given(self: Any, stages: Any, has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = pipelining_utils.InferenceMode.STATIC

    if votes is not None:  # new in torch 2.13
        schedule._warmup_p2p = given  # type: ignore[method-assign]
    try:
        yield
    finally:
        if votes is not None:
            schedule._warmup_p2p = votes  # type: ignore[method-assign]


class Message(NamedTuple):
    """One kind of collective on one group: its operator, and the group's name and size."""

    operator: str
    group: str
    size: int


@dataclass
class Sent:
    """How often, and how many bytes the largest tensors of the calls had together (the whole of what is gathered or
    scattered)."""

    calls: int = 0
    bytes: int = 0


@dataclass
class _Storages:
    """Bytes of the storages that are alive."""

    sizes: dict[int, int] = field(default_factory=dict)
    now: int = 0
    peak: int = 0

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = 0
        self.resize(key, storage.nbytes())
        weakref.finalize(storage, self.forget, key).atexit = False

    def resize(self, key: int, size: int) -> None:
        self.now += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Watch(TorchDispatchMode):
    """Counts bytes of tensors and collectives inside; enter it inside `without_contents`.

    Attributes:
        messages: what was sent or received, by `Message`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[Message, Sent] = {}
        self._storages = _Storages()

    @property
    def bytes_now(self) -> int:
        """Bytes of tensors that are alive, of those made or used inside."""
        return self._storages.now

    def take_peak(self) -> int:
        """The most bytes at once since the last call, or since the beginning."""
        peak, self._storages.peak = self._storages.peak, self._storages.now
        return peak

    def take_messages(self) -> dict[Message, Sent]:
        """What was sent since the last call, or since the beginning."""
        messages, self.messages = self.messages, {}
        return messages

    def __enter__(self) -> Watch:
        self._resize = torch.UntypedStorage.resize_
        storages, resize = self._storages, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in storages.sizes:
                storages.resize(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what DTensor makes of it comes here again
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if leaf is not None]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.device.type != "meta":
                self._storages.see(leaf.untyped_storage())
        if func.namespace in _COMM and not any(func._schema.name.endswith(name) for name in _WAITS):
            self._note(func, leaves)
        return result

    def _note(self, func: Any, leaves: list[Any]) -> None:
        group = next((found for leaf in leaves if (found := _group_of(leaf)) is not None), None)
        assert group is not None, f"{func} names no group"
        message = Message(func._schema.name.partition("::")[2], group.group_name, group.size())
        sent = self.messages.setdefault(message, Sent())
        sent.calls += 1
        sent.bytes += max(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


_find_group: Any = _resolve_process_group


def _group_of(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject):
        with contextlib.suppress(RuntimeError, TypeError):
            return dist.ProcessGroup.unbox(value)
    if isinstance(value, str):
        with contextlib.suppress(RuntimeError):
            found: dist.ProcessGroup = _find_group(value)
            return found
    return None
