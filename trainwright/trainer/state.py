"""Where a run stands: the few numbers beside weights and optimizer state that a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from trainwright.base.protocols import StateDict

__all__ = ["TrainState"]


@dataclass
class TrainState:
    """Counters of a run. All of them are saved.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens: trained tokens seen.
        skipped: steps that the NaN or spike policy refused.
        seconds: seconds spent in steps, over all sessions of the run; for reports only, no decision rests on it.
        evaluations: evaluations done.
        last_evaluation: step of the last evaluation, -1 before the first.
        best_loss: lowest validation loss so far, and `best_step` where it was seen; inf and -1 before the first.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    last_evaluation: int = -1
    best_loss: float = float("inf")
    best_step: int = -1

    def state_dict(self) -> StateDict:
        return asdict(self)

    def load_state_dict(self, state: StateDict) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name])
