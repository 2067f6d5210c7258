"""Where the memory is: bytes counted from live tensors of this rank, beside what the process really uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.device import memory_bytes, peak_memory_bytes
from trainwright.base.text import align_columns, human_bytes
from trainwright.memory.meter import local_tensor, storage_bytes

__all__ = ["MemoryReport", "ProcessMemory", "count_memory", "process_memory"]

KINDS = ("parameters", "gathered", "gradients", "optimizer", "buffers", "activations", "weight_copies")
"""The kinds of memory in the order of a table."""


@dataclass(frozen=True)
class ProcessMemory:
    """What the operating system and the device say of this process, in bytes; 0 where they do not tell.

    resident: of physical memory now; anonymous: of that, what no file backs (mapped files are reclaimed when needed).
    resident_peak: the most since the process started.
    device_allocated, device_reserved, device_peak: of torch's CUDA allocator: in tensors, taken, and the most in
    tensors.
    """

    resident: int
    anonymous: int
    resident_peak: int
    device_allocated: int = 0
    device_reserved: int = 0
    device_peak: int = 0


def process_memory() -> ProcessMemory:
    """Now, of this process and of the current CUDA device if there is one."""
    host = (memory_bytes(), _status_bytes("RssAnon"), peak_memory_bytes())
    if not torch.cuda.is_available():
        return ProcessMemory(*host)
    allocated, reserved, peak = (
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
        torch.cuda.max_memory_allocated(),
    )
    return ProcessMemory(*host, device_allocated=allocated, device_reserved=reserved, device_peak=peak)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by kind on one rank.

    parameters: this rank's parts, of a replicated parameter all of it. gathered: whole parameters that FSDP2 holds
    beside its parts now. gradients. optimizer: state in memory; on_disk: state in files. buffers.
    activations, weight_copies: see `ActivationMeter`; 0 where nothing was metered.
    """

    rank: int
    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    on_disk: int
    buffers: int
    activations: int
    weight_copies: int
    process: ProcessMemory

    @property
    def total(self) -> int:
        """Of all kinds that are in memory."""
        return sum(getattr(self, kind) for kind in KINDS)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "total": self.total}

    def table(self, predicted: Mapping[str, int] | None = None) -> str:
        """Lines for a person: each kind counted and, where `predicted` has it, predicted and the difference."""
        rows: list[tuple[str, ...]] = [
            ("", "counted") if predicted is None else ("", "counted", "predicted", "difference")
        ]
        for kind in (*KINDS, "total"):
            counted = getattr(self, kind)
            guess = None if predicted is None else predicted.get(kind)
            if counted or guess:
                rows.append((kind.replace("_", " "), human_bytes(counted), *_compared(counted, guess, predicted)))
        if self.on_disk:
            rows.append(("optimizer on disk", human_bytes(self.on_disk)))
        lines = align_columns(rows, right=(1, 2, 3))
        process = self.process
        lines.append(
            f"rank {self.rank}: the process holds {human_bytes(process.resident)}"
            f" ({human_bytes(process.anonymous)} of it not backed by files),"
            f" at most {human_bytes(process.resident_peak)}"
        )
        if process.device_reserved:
            lines.append(
                f"rank {self.rank}: the device holds {human_bytes(process.device_allocated)} in tensors, at most"
                f" {human_bytes(process.device_peak)}; {human_bytes(process.device_reserved)} are reserved"
            )
        return "\n".join(lines)


def count_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    activations: int = 0,
    weight_copies: int = 0,
    rank: int = 0,
    on_disk: int = 0,
    held_gradients: Iterable[Tensor] = (),
) -> MemoryReport:
    """Count the live tensors of a model and its optimizer on this rank; each piece of memory once (tied parameters).

    Args:
        activations, weight_copies: of an `ActivationMeter`.
        on_disk: bytes of optimizer state that lie in a file (`MappedState.moved_bytes`); they are not counted as
            memory.
        held_gradients: those that whoever accumulates keeps apart from `parameter.grad`.
    """
    records = _fsdp_parameters(model)
    parameters = _held_parameters(model, records)
    states: Iterable[Tensor] = ()
    if optimizer is not None:
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return MemoryReport(
        rank=rank,
        parameters=storage_bytes(parameters),
        gathered=storage_bytes(tensor for record in records for tensor in record.all_gather_outputs),
        gradients=storage_bytes([*_gradients(parameters, records), *held_gradients]),
        optimizer=_bytes(states) - on_disk,
        on_disk=on_disk,
        buffers=storage_bytes(model.buffers()),
        activations=activations,
        weight_copies=weight_copies,
        process=process_memory(),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors: numbers times size, for tensors that share a mapped file share one storage."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def _compared(counted: int, guess: int | None, predicted: Mapping[str, int] | None) -> tuple[str, ...]:
    if predicted is None:
        return ()
    if guess is None:
        return ("", "")
    return human_bytes(guess), f"{(counted - guess) / guess:+.1%}" if guess else ""


def _fsdp_parameters(model: nn.Module) -> list[Any]:
    """FSDP2's own record of each parameter; what is asked of it is not public (checked on torch 2.13)."""
    found: list[Any] = []
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        for group in _groups(state()) if state is not None else ():
            found += group.fsdp_params
    return found


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _held_parameters(model: nn.Module, records: list[Any]) -> list[nn.Parameter]:
    """This rank's parts, also while the model has whole parameters in their place."""
    whole = {id(getattr(record, "_unsharded_param", None)) for record in records}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in whole]
    return [*plain, *(record.sharded_param for record in records)]


def _gradients(parameters: list[nn.Parameter], records: list[Any]) -> list[Tensor]:
    """Gradients of parameters, and those that FSDP2 keeps whole between micro-batches."""
    found = [parameter.grad for parameter in parameters]
    for record in records:
        whole = getattr(record, "_unsharded_param", None)
        found += [None if whole is None else whole.grad, record.unsharded_accumulated_grad]
    return [gradient for gradient in found if gradient is not None]


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
