"""Memory: what is computed again, kept elsewhere or counted, so that more fits and one knows why."""

from trainwright.memory.chunked_mlp import apply_chunked_mlp
from trainwright.memory.meter import ActivationMeter
from trainwright.memory.offload import ActivationOffload, HostCopies, PinnedCopies
from trainwright.memory.recompute import RecomputePolicy, apply_recompute, read_policy, remove_recompute
from trainwright.memory.report import MemoryReport, ProcessMemory, count_memory, process_memory
from trainwright.memory.state_file import StateFile
from trainwright.memory.state_store import HostState, MappedState, PlacedState, place_state

__all__ = [
    "ActivationMeter",
    "ActivationOffload",
    "HostCopies",
    "HostState",
    "MappedState",
    "MemoryReport",
    "PinnedCopies",
    "PlacedState",
    "ProcessMemory",
    "RecomputePolicy",
    "StateFile",
    "apply_chunked_mlp",
    "apply_recompute",
    "count_memory",
    "place_state",
    "process_memory",
    "read_policy",
    "remove_recompute",
]
