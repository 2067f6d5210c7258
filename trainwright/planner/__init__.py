"""The planner: every "auto" becomes a number with its reason, and the run's cost is predicted."""

from trainwright.planner.facts import BatchFacts, DataFacts, MachineFacts, ModelFacts, ModelShape
from trainwright.planner.layout import choose_layout
from trainwright.planner.legality import check_layout, layout_problems, nearest_legal
from trainwright.planner.model_facts import model_facts
from trainwright.planner.plan import Decision, Plan, Prediction
from trainwright.planner.resolve import resolve
from trainwright.planner.rules import choose_vocab_size
from trainwright.planner.tuning import TuningFacts

__all__ = [
    "BatchFacts",
    "DataFacts",
    "Decision",
    "MachineFacts",
    "ModelFacts",
    "ModelShape",
    "Plan",
    "Prediction",
    "TuningFacts",
    "check_layout",
    "choose_layout",
    "choose_vocab_size",
    "layout_problems",
    "model_facts",
    "nearest_legal",
    "resolve",
]
