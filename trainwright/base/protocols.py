"""The contracts between rooms: whatever remembers something, and whatever trains on a batch."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["StateDict", "Stateful"]

StateDict = dict[str, Any]
"""Nested dicts (string keys) and lists whose leaves are tensors or JSON values (None, bool, int, float, str)."""


@runtime_checkable
class Stateful(Protocol):
    """Remembers something that a resumed run needs. Stands in the one dict that is checkpointed."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: StateDict) -> None: ...
