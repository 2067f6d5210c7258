"""Optimizer state that lives on the host or on a disk and is in working memory one bucket at a time.

ZeRO-Offload, arXiv 2101.06840, and ZeRO-Infinity, arXiv 2104.07857, without a native extension: the update is the
optimizer's own, run over slices of parameters, so results are bitwise those of state in memory.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.memory.meter import local_tensor
from trainwright.memory.staging import CopiedStaging, DirectStaging, Staging
from trainwright.memory.state_file import StateFile, aligned_buffer
from trainwright.memory.state_layout import (
    HALVES,
    OVERRIDDEN,
    Bucket,
    Optimizer,
    Piece,
    Placed,
    Unit,
    is_small,
    plan_buckets,
    plan_pieces,
    shadow,
)

__all__ = ["BUCKET_BYTES", "HostState", "MappedState", "PlacedState", "place_state"]

BUCKET_BYTES = 8 << 20
"""Of state in memory at once; three buckets are held. Measured, reads of 4 MiB and of 64 MiB are equally fast."""

BUFFERS = 3  # one is read, one is updated, one is written


def place_state(
    optimizer: Any,
    where: Literal["device", "host", "nvme"],
    *,
    folder: str | Path | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> PlacedState | None:
    """Move the state of an optimizer; None where there is nothing to move.

    Call it when parameters hold their first weights, are sharded and on their device, before or after a state was
    loaded. "host" beside parameters in host memory is what they have already: nothing is done. Nor is there anything to
    move on a stage of a pipeline of which nothing is trained.

    Raises:
        ConfigError: "nvme" without a usable folder.
        MemoryLimitError: the disk has not enough space.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not parameters:
        return None
    device = local_tensor(parameters[0]).device
    if where == "device" or (where == "host" and device.type == "cpu"):
        return None
    if where == "host":
        return HostState(optimizer, bucket_bytes=bucket_bytes)
    if folder is None:
        raise ConfigError(
            "memory.optimizer_state is nvme, and no folder is given", hint="set memory.nvme_path to a folder on a disk"
        )
    return MappedState(optimizer, folder, bucket_bytes=bucket_bytes)


class PlacedState:
    """Drives an optimizer whose state is elsewhere. Afterwards `optimizer.step`, `state_dict` and `load_state_dict`
    work as before; `optimizer.state` shows where the state now is.

    Args:
        optimizer: a GroupedOptimizer.
        bucket_bytes: of state that are updated at a time.
        staged: whether weights are copied to the host for the update; default where they are not there already.

    Attributes:
        moved_bytes: of state that is now elsewhere.
    """

    def __init__(self, optimizer: Optimizer, *, bucket_bytes: int = BUCKET_BYTES, staged: bool | None = None) -> None:
        self.optimizer: Any = optimizer
        device = local_tensor(optimizer.param_groups[0]["params"][0]).device
        self._copied = device.type != "cpu" if staged is None else staged
        self._staging: Staging = CopiedStaging(device) if self._copied else DirectStaging()
        placed, file_bytes = plan_pieces(optimizer)
        # What cannot be cut is updated where it is: as a flat piece on the host it would be something else.
        self._placed = [one for one in placed if one.cuttable or not self._copied]
        self.moved_bytes = sum(piece.size for one in self._placed for piece in one.pieces)
        self._buckets = plan_buckets(self._placed, bucket_bytes)
        moved = {id(one.parameter) for one in self._placed}
        self._resident = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in moved]
        self._prepare(file_bytes)
        with torch.no_grad():
            for one in self._placed:
                self._move(one)
        self._own: dict[str, Callable[..., Any]] = {}
        for name in OVERRIDDEN:
            self._own[name] = getattr(optimizer, name)
            setattr(optimizer, name, getattr(self, f"_{name}" if name != "step" else name))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_factor: float | Tensor | None = None) -> Any:
        """One optimizer step, bucket by bucket; see GroupedOptimizer.step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer.begin_step()
        if self._resident:
            self._own["step_part"](self._resident, gradient_factor)
        if isinstance(gradient_factor, Tensor) and self._copied:
            gradient_factor = gradient_factor.cpu()
        todo = [bucket for bucket in self._buckets if bucket.whole or bucket.has_gradients]
        try:
            self._step_buckets(todo, gradient_factor)
        except BaseException:
            self._abandon()
            raise
        return loss

    def _step_buckets(self, todo: list[Bucket], gradient_factor: Any) -> None:
        self._begin(todo)
        coming = self._staging.fetch(todo[0]) if todo else None
        for i, bucket in enumerate(todo):
            ahead = self._staging.fetch(todo[i + 1]) if i + 1 < len(todo) else None
            states = self._borrow(bucket)
            self._update(bucket, self._staging.arrive(bucket, coming), states, gradient_factor)
            self._staging.send(bucket, coming)
            self._give_back(bucket)
            coming = ahead
        self._staging.finish()
        self._end(todo)

    def close(self, *, keep: bool = True) -> None:
        """Make the optimizer ordinary again. keep: bring its state back beside the parameters; else it is dropped."""
        for name in self._own:
            del self.optimizer.__dict__[name]
        for one in self._placed:
            state = self.optimizer.state[one.parameter]
            if keep:
                usual = self._materialised(one.local[:0] if one.local.ndim else one.local, one.group)
                large = {piece.key for piece in one.pieces}
                for key, tensor in usual.items():
                    state[key] = state[key].to(tensor.device, copy=key in large)
            else:
                self.optimizer.state.pop(one.parameter, None)
        self._own = {}
        self._release()

    # -- what the optimizer's own methods become -----------------------------------------------------------------------

    def _step_part(self, parameters: Any, gradient_factor: Any = None) -> None:
        if self._copied:
            raise ConfigError(
                "parameters cannot be updated in parts while their optimizer state is on the host",
                hint="set memory.release_gradients=false or memory.optimizer_state=device",
            )
        self._forget()
        self._own["step_part"](parameters, gradient_factor)

    def _state_dict(self) -> Any:
        self._shown()
        return self._own["state_dict"]()

    def _load_state_dict(self, state: Any) -> None:
        self._forget()
        self._own["load_state_dict"](state)
        self._shown()

    def _weights_changed(self) -> None:
        self._forget()
        self._own["weights_changed"]()
        self._shown()

    # -- one bucket ----------------------------------------------------------------------------------------------------

    def _update(
        self,
        bucket: Bucket,
        parts: list[tuple[Unit, Tensor]],
        states: dict[Unit, dict[str, Tensor]],
        gradient_factor: Any,
    ) -> None:
        by_group: dict[int, list[tuple[str, Tensor]]] = {}
        state: dict[Tensor, dict[str, Tensor]] = {}
        for unit, tensor in parts:
            by_group.setdefault(unit.placed.group, []).append((unit.placed.name, tensor))
            small = self._small(unit.placed)
            # Every slice counts the step from the same number; the last one's count stays.
            state[tensor] = {k: v.clone() for k, v in small.items()} if unit.is_slice else dict(small)
            state[tensor].update(states[unit])
        twin = shadow(self.optimizer, by_group, state)
        twin.step_part([tensor for _, tensor in parts], gradient_factor)
        for unit, tensor in parts:
            if unit.is_slice and unit.stop == unit.placed.local.numel():
                for key, value in self._small(unit.placed).items():
                    value.copy_(state[tensor][key])

    def _small(self, placed: Placed) -> dict[str, Tensor]:
        large = {piece.key for piece in placed.pieces}
        return {key: value for key, value in self.optimizer.state[placed.parameter].items() if key not in large}

    def _move(self, placed: Placed) -> None:
        """Make the state of one parameter, or take what it has, and put it where it belongs."""
        state = self.optimizer.state[placed.parameter]
        if not state:
            state.update(self._made(placed.local, placed.group))
        elif self._copied:
            state.update({key: tensor.cpu() for key, tensor in state.items()})
        for piece in placed.pieces:
            state[piece.key] = self._put(piece, state[piece.key])

    def _made(self, local: Tensor, group: int) -> dict[str, Tensor]:
        """The first state of a parameter that holds `local`, on the host; zeros that will be moved are on "meta"."""
        if local.dtype in HALVES:
            # Not zeros alone: a copy of the weights.
            return self._materialised(local.cpu() if self._copied else local, group)
        return {
            key: torch.zeros(tensor.shape, dtype=tensor.dtype) if is_small(tensor) else tensor
            for key, tensor in self._materialised(torch.empty_like(local, device="meta"), group).items()
        }

    def _materialised(self, local: Tensor, group: int) -> dict[str, Tensor]:
        twin = shadow(self.optimizer, {group: [("", local)]}, {})
        twin.materialise_state()
        made: dict[str, Tensor] = twin.state[local]
        return made

    # -- what a place is -----------------------------------------------------------------------------------------------

    def _prepare(self, file_bytes: int) -> None:
        """Before any state is moved."""

    def _put(self, piece: Piece, value: Tensor) -> Tensor:
        """Move one state tensor; returns it in its new place."""
        raise NotImplementedError

    def _begin(self, todo: list[Bucket]) -> None:
        """A step over these buckets begins."""

    def _borrow(self, bucket: Bucket) -> dict[Unit, dict[str, Tensor]]:
        """The state of a bucket in working memory, flat for slices."""
        raise NotImplementedError

    def _give_back(self, bucket: Bucket) -> None:
        """The state of a bucket has been updated."""

    def _end(self, todo: list[Bucket]) -> None:
        """All of them have."""

    def _abandon(self) -> None:
        """A step has failed in its middle."""

    def _forget(self) -> None:
        """The state is about to be changed by others."""

    def _shown(self) -> None:
        """The state is read or was written as a whole."""

    def _release(self) -> None:
        """The place is no longer needed."""


class HostState(PlacedState):
    """State in host memory, updated there by the CPU; weights and gradients travel."""

    def _put(self, piece: Piece, value: Tensor) -> Tensor:
        return value.to("cpu") if value.device.type != "meta" else torch.zeros(piece.shape, dtype=piece.dtype)

    def _borrow(self, bucket: Bucket) -> dict[Unit, dict[str, Tensor]]:
        found: dict[Unit, dict[str, Tensor]] = {}
        for unit in bucket.units:
            state = self.optimizer.state[unit.placed.parameter]
            found[unit] = {
                piece.key: state[piece.key].view(-1)[unit.start : unit.stop] if unit.is_slice else state[piece.key]
                for piece in unit.placed.pieces
            }
        return found


class MappedState(PlacedState):
    """State in a file of this rank (see `StateFile`), three buckets of it in memory.

    One thread reads ahead and one writes back while the update runs; at the end of a step the first buckets of the next
    are read already. `optimizer.state` holds tensors that map the file: a save goes through them and loads what it is
    writing, no more.

    Attributes:
        file: where the state is.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        folder: str | Path,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        staged: bool | None = None,
    ) -> None:
        self._folder = folder
        super().__init__(optimizer, bucket_bytes=bucket_bytes, staged=staged)
        size = max((bucket.bytes for bucket in self._buckets), default=0)
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(aligned_buffer(size))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="state-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self._coming: dict[Bucket, Future[Tensor]] = {}
        self._buffer_of: dict[Bucket, Tensor] = {}
        self._writes: list[Future[None]] = []
        self._pages_touched = True

    def _prepare(self, file_bytes: int) -> None:
        self.file = StateFile(self._folder, file_bytes)

    def _put(self, piece: Piece, value: Tensor) -> Tensor:
        mapped = self.file.tensor(piece.offset, piece.shape, piece.dtype)
        if value.device.type != "meta":  # else zeros, which the file is already
            mapped.copy_(value)
            self.file.settle()
        return mapped

    def _begin(self, todo: list[Bucket]) -> None:
        if self._pages_touched:
            self.file.settle()
            self._pages_touched = False
        for bucket in [bucket for bucket in self._coming if bucket not in todo]:
            self._free.put(self._coming.pop(bucket).result())
        for bucket in todo:
            self._read_ahead(bucket)

    def _read_ahead(self, bucket: Bucket) -> None:
        if bucket not in self._coming:
            self._coming[bucket] = self._reader.submit(self._read, bucket)

    def _read(self, bucket: Bucket) -> Tensor:
        buffer = self._free.get()
        try:
            for offset, size, place in bucket.ranges():
                self.file.read(offset, buffer[place : place + size])
        except BaseException:
            self._free.put(buffer)
            raise
        return buffer

    def _borrow(self, bucket: Bucket) -> dict[Unit, dict[str, Tensor]]:
        buffer = self._buffer_of[bucket] = self._coming.pop(bucket).result()
        found: dict[Unit, dict[str, Tensor]] = {}
        for unit, piece, place, size in bucket.places():
            state = buffer[place : place + size].view(piece.dtype)
            found.setdefault(unit, {})[piece.key] = state if unit.is_slice else state.view(piece.shape)
        for unit in bucket.units:
            found.setdefault(unit, {})
        return found

    def _give_back(self, bucket: Bucket) -> None:
        self._writes.append(self._writer.submit(self._write, bucket, self._buffer_of.pop(bucket)))

    def _write(self, bucket: Bucket, buffer: Tensor) -> None:
        try:
            for offset, size, place in bucket.ranges():
                self.file.write(offset, buffer[place : place + size])
        finally:
            self._free.put(buffer)

    def _end(self, todo: list[Bucket]) -> None:
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()
        for bucket in todo[: BUFFERS - 1]:
            self._read_ahead(bucket)

    def _abandon(self) -> None:
        for bucket in list(self._buffer_of):
            self._free.put(self._buffer_of.pop(bucket))
        writes, self._writes = self._writes, []
        for write in writes:
            write.exception()
        # Reads wait for free buffers: one that has arrived is given back before the next is waited for.
        for bucket in list(self._coming):
            read = self._coming.pop(bucket)
            if read.exception() is None:
                self._free.put(read.result())

    def _forget(self) -> None:
        for bucket in list(self._coming):
            self._free.put(self._coming.pop(bucket).result())
        self._pages_touched = True

    def _shown(self) -> None:
        self._pages_touched = True

    def _release(self) -> None:
        self._forget()
        self._reader.shutdown()
        self._writer.shutdown()
        self.file.close()
