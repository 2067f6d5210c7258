"""Callbacks: what happens around the loop without being part of it. Each moment is a method that does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainwright.base.metric_names import less_is_better
from trainwright.base.protocols import StateDict
from trainwright.tasks.task import Metric, Task

if TYPE_CHECKING:
    from trainwright.engine import StepReport
    from trainwright.trainer.evaluation import Evaluation
    from trainwright.trainer.run import Run

__all__ = ["Callback", "EarlyStopping", "followed_metric"]


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
    """Ends the run when a metric has not got better for `patience` evaluations.

    Args:
        patience: evaluations without improvement that are borne.
        min_delta: smallest improvement that counts, in units of the metric.
        metric: its name; "auto" is the task's own, or the loss where evaluations during training do not give that.
    """

    name = "early_stopping"

    def __init__(self, *, patience: int, min_delta: float = 0.0, metric: str = "auto") -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.metric = metric
        self.followed = ""
        self.best = float("inf")
        self.waited = 0

    def on_run_start(self, run: Run) -> None:
        self._end(run)  # a run that was cut off between this and its end has nothing more to train

    def on_evaluation(self, run: Run, result: Evaluation) -> None:
        metric = followed_metric(self.metric, run.task, result)
        value = result.metric(metric.name)
        if metric.name != self.followed:
            self.followed, self.best, self.waited = metric.name, -float("inf") if metric.higher else float("inf"), 0
        gain = value - self.best if metric.higher else self.best - value
        if gain > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        self._end(run)

    def _end(self, run: Run) -> None:
        """Ask the run to stop once patience is at its end."""
        if self.waited < self.patience:
            return
        name = "validation loss" if self.followed == "loss" else self.followed
        times = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        run.stop_reason = f"{name} has not got better than {self.best:.4f}{by} in {times}"

    def state_dict(self) -> StateDict:
        return {"metric": self.followed, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: StateDict) -> None:
        self.followed = state.get("metric", "loss")  # older checkpoints know of the loss alone
        self.best, self.waited = state["best"], state["waited"]


def followed_metric(name: str, task: Task, result: Evaluation) -> Metric:
    """The metric that a recipe means by `name`, and whether more of it is better.

    "auto" is the task's own. Where an evaluation during training does not give that (a score of generated texts), it
    is the loss.

    Raises:
        ConfigError: this task has no such metric.
    """
    own = task.best
    if name == "auto":
        return own if own.name == "loss" or own.name in result.metrics else Metric()
    result.metric(name)
    return own if own.name == name else Metric(name, higher=not less_is_better(name))
