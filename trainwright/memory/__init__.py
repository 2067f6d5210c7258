"""Memory: what is computed again, kept elsewhere or counted, so that more fits and one knows why."""

from trainwright.memory.meter import ActivationMeter
from trainwright.memory.offload import ActivationOffload, HostCopies, PinnedCopies
from trainwright.memory.recompute import RecomputePolicy, apply_recompute, read_policy, remove_recompute

__all__ = [
    "ActivationMeter",
    "ActivationOffload",
    "HostCopies",
    "PinnedCopies",
    "RecomputePolicy",
    "apply_recompute",
    "read_policy",
    "remove_recompute",
]
