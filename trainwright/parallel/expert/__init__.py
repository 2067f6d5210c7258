"""Expert parallelism: the experts of a layer divided over processes, and tokens sent to where their experts are."""

from __future__ import annotations

from trainwright.parallel.expert.apply import apply_expert, expert_modules
from trainwright.parallel.expert.problems import expert_problems, legal_expert_degrees

__all__ = ["apply_expert", "expert_modules", "expert_problems", "legal_expert_degrees"]
