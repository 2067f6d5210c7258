"""Callbacks: what happens around the loop without being part of it. Each moment is a method that does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainwright.base.events import emit
from trainwright.base.protocols import StateDict

if TYPE_CHECKING:
    from trainwright.engine import StepReport
    from trainwright.trainer.build import Run
    from trainwright.trainer.evaluation import Evaluation

__all__ = ["Callback", "EarlyStopping"]


class Callback:
    """Base of all callbacks. A callback that remembers something returns it from `state_dict`.

    `name` keys its state in checkpoints and must be unique in a run.
    """

    name = ""

    def on_run_start(self, run: Run) -> None:
        """After everything is built and, on resume, restored."""

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """After every optimizer step."""

    def on_evaluation(self, run: Run, result: Evaluation) -> None:
        """After every pass over the validation rows."""

    def on_run_end(self, run: Run) -> None:
        """After the last step and the last evaluation, before the model is exported."""

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        return None


class EarlyStopping(Callback):
    """Ends the run when the validation loss has not improved for `patience` evaluations.

    Args:
        patience: evaluations without improvement that are borne.
        min_delta: smallest fall of the loss, in nats, that counts as improvement.
    """

    name = "early_stopping"

    def __init__(self, *, patience: int, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best = float("inf")
        self.waited = 0

    def on_evaluation(self, run: Run, result: Evaluation) -> None:
        if result.loss < self.best - self.min_delta:
            self.best, self.waited = result.loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            message = f"early stopping: no improvement on {self.best:.4f} in {self.waited} evaluations"
            emit("warning", message=message)
            run.stop_reason = message

    def state_dict(self) -> StateDict:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: StateDict) -> None:
        self.best, self.waited = state["best"], state["waited"]
