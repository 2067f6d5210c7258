"""Memory: what is computed again, kept elsewhere or counted, so that more fits and one knows why."""

from trainwright.memory.meter import ActivationMeter
from trainwright.memory.offload import ActivationOffload, HostCopies, PinnedCopies
from trainwright.memory.recompute import RecomputePolicy, apply_recompute, read_policy, remove_recompute
from trainwright.memory.state_file import StateFile
from trainwright.memory.state_store import HostState, MappedState, PlacedState, place_state

__all__ = [
    "ActivationMeter",
    "ActivationOffload",
    "HostCopies",
    "HostState",
    "MappedState",
    "PinnedCopies",
    "PlacedState",
    "RecomputePolicy",
    "StateFile",
    "apply_recompute",
    "place_state",
    "read_policy",
    "remove_recompute",
]
