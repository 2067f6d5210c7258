"""Bytes on the wire, counted where they are handed to a collective.

One collective of a ring over N ranks sends, per rank and per byte of the whole tensor, (N - 1) / N for an all-gather, a
reduce-scatter and an all-to-all, twice that for an all-reduce (arXiv 1910.02054, section 7).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """Bytes that this rank sent, by kind of collective, since the last `take`."""

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, whole_bytes: int, world: int) -> None:
        """Note one collective over `world` ranks whose complete tensor has `whole_bytes`."""
        self.sent[kind] += whole_bytes * (world - 1) // world
        self.calls[kind] += 1

    @property
    def total(self) -> int:
        """Bytes sent by this rank, all kinds together."""
        return sum(self.sent.values())

    def take(self) -> dict[str, int]:
        """The bytes by kind, and start again at zero."""
        result = dict(self.sent)
        self.sent.clear()
        self.calls.clear()
        return result
