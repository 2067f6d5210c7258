"""The planner: every "auto" becomes a number with its reason, and the run's cost is predicted."""

from trainwright.planner.facts import DataFacts, MachineFacts, ModelFacts
from trainwright.planner.plan import Decision, Plan, Prediction
from trainwright.planner.resolve import resolve
from trainwright.planner.rules import choose_vocab_size

__all__ = [
    "DataFacts",
    "Decision",
    "MachineFacts",
    "ModelFacts",
    "Plan",
    "Prediction",
    "choose_vocab_size",
    "resolve",
]
