"""What is written down while a recipe is resolved: decisions with their reasons, and how long to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainwright.planner.plan import Decision

__all__ = ["AUTO", "Budget", "Ledger"]

AUTO = "auto"


@dataclass
class Ledger:
    """Collects decisions: a value that the recipe gives stands, an "auto" is decided and written down."""

    decisions: list[Decision] = field(default_factory=list)

    def settle(self, key: str, given: Any, decide: Any) -> Any:
        if given != AUTO:
            return given
        value, reason = decide()
        self.decisions.append(Decision(key, value, reason))
        return value


@dataclass(frozen=True)
class Budget:
    """How long to train: trained tokens, and how that came about."""

    tokens: int
    what: str
    steps: int | None = None
