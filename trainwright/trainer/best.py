"""The best evaluation of a run: its checkpoint is kept beside the newest ones, and its weights become `model/`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.events import emit
from trainwright.base.protocols import StateDict
from trainwright.config import Recipe
from trainwright.config.run_section import KeepBestSection
from trainwright.tasks.task import Task
from trainwright.trainer.callbacks import Callback, followed_metric
from trainwright.trainer.together import first_decides

if TYPE_CHECKING:
    from pathlib import Path

    from trainwright.engine import StepReport
    from trainwright.trainer.evaluation import Evaluation
    from trainwright.trainer.run import Run

__all__ = ["Best", "best_callback", "take_best_weights"]


class Best(Callback):
    """Follows a metric, asks for a checkpoint after each evaluation that is better than all before, and protects it.

    The save itself is the loop's, after all callbacks have seen the evaluation: a run that goes on from it knows all
    that they know. The checkpoint before stays until the new one is on the disk.

    Args:
        metric: see `callbacks.followed_metric`.
        keep: whether checkpoints are kept; otherwise the best is only noted.
        exports: whether the weights of the best evaluation become the run's model.

    Attributes:
        followed: name of the metric that `value` is of; "" before the first evaluation.
        value, step: the best so far and where it was seen; step is -1 before the first.
        loss: of the same evaluation; of equal values the one of less loss is better.
    """

    name = "best"

    def __init__(self, metric: str = "auto", *, keep: bool = True, exports: bool = True) -> None:
        self.metric = metric
        self.keep = keep
        self.exports = exports
        self.followed = ""
        self.value = 0.0
        self.loss = math.inf
        self.step = -1
        self._kept: list[int] = []

    def on_run_start(self, run: Run) -> None:
        if self.step < 0 or not self.keep:
            return
        path = _folder(run, self.step)
        if first_decides(run.ranks, lambda: path.is_dir()):
            self._protect(run, self.step)
            return
        emit(
            "warning",
            code="best.lost",
            message=f"the checkpoint of the best evaluation, {path}, is gone: the best is looked for anew",
        )
        self.followed, self.value, self.step = "", 0.0, -1

    def on_evaluation(self, run: Run, result: Evaluation) -> None:
        metric = followed_metric(self.metric, run.task, result)
        value = result.metric(metric.name)
        if metric.name != self.followed:
            self.followed, self.step = metric.name, -1
        better = self.step < 0 or (value > self.value if metric.higher else value < self.value)
        better |= value == self.value and result.loss < self.loss
        if not better or math.isnan(value):
            return
        self.value, self.loss, self.step = value, result.loss, run.state.step
        if self.keep:
            self._protect(run, self.step)
            run.save_wanted = True

    def on_step_end(self, run: Run, report: StepReport) -> None:
        self._let_go(run)

    def on_run_end(self, run: Run) -> None:
        self._let_go(run)

    def _protect(self, run: Run, step: int) -> None:
        run.checkpointer.protect(step)
        # Of two that are not on the disk yet neither is the last good one: only the newest whole one is.
        whole = [kept for kept in self._kept if _folder(run, kept).is_dir()][-1:]
        for kept in set(self._kept) - {*whole, step}:
            run.checkpointer.unprotect(kept)
        self._kept = [*whole, step] if step not in whole else whole

    def _let_go(self, run: Run) -> None:
        """Leave the one before to retention, once the best is on the disk."""
        if len(self._kept) > 1 and not run.checkpointer.is_busy and _folder(run, self._kept[-1]).is_dir():
            for kept in self._kept[:-1]:
                run.checkpointer.unprotect(kept)
            self._kept = self._kept[-1:]

    def state_dict(self) -> StateDict:
        return {"metric": self.followed, "value": self.value, "loss": self.loss, "step": self.step}

    def load_state_dict(self, state: StateDict) -> None:
        self.followed, self.value, self.step = state["metric"], state["value"], state["step"]
        self.loss = state.get("loss", -math.inf)  # older checkpoints know of the value alone: the first stays


def best_callback(recipe: Recipe, task: Task, *, validated: bool) -> Best:
    """What `checkpoint.keep_best` and `train.export` ask for.

    Args:
        validated: whether the run has evaluations at all.

    Raises:
        ConfigError: the two contradict each other, or there is nothing to find the best by.
    """
    wanted, export, stopping = recipe.checkpoint.keep_best, recipe.train.export, recipe.train.early_stopping
    metric = stopping.metric if stopping is not None else "auto"
    if isinstance(wanted, KeepBestSection):
        metric = wanted.metric if wanted.metric != "auto" else metric
    keep = wanted is True or isinstance(wanted, KeepBestSection)
    if wanted is False and export == "best":
        raise ConfigError(
            "train.export is best, and checkpoint.keep_best is false: the best weights are not kept",
            hint="set checkpoint.keep_best=true, or train.export=last",
        )
    if not validated and (keep or export == "best"):
        raise ConfigError(
            f"{'checkpoint.keep_best' if keep else 'train.export best'} needs evaluations, and this run has none",
            hint="give data.validation and train.eval_every, or leave checkpoint.keep_best and train.export at auto",
        )
    if wanted == "auto":
        keep = validated and (task.best.name != "loss" or stopping is not None or export == "best")
    return Best(metric, keep=keep, exports=keep and export != "last")


def take_best_weights(run: Run) -> bool:
    """Give the model the weights of the best evaluation, if the run exports these and goes on with others; whether it
    did. A collective, for a run that has ended and whose last checkpoint is saved.

    The whole state of that checkpoint is read into the engine, in any layout, as a resumed run would read it. When it
    cannot be read, a warning says so and the last weights stay.
    """
    best = next((callback for callback in run.callbacks if isinstance(callback, Best)), None)
    if best is None or not best.exports or best.step in (-1, run.state.step):
        return False
    path = _folder(run, best.step)
    like = run.state_dict() if run.ranks.world > 1 else None
    try:
        run.checkpointer.wait()
        state, _ = run.checkpointer.load(path, like=like)
    except CheckpointError as error:
        emit(
            "warning",
            code="best.unreadable",
            message=f"the weights of the best evaluation cannot be read, the last ones are exported: {error}",
        )
        return False
    run.load_engine(state)
    emit("notice", message=f"model/ has the weights of step {best.step}: {best.followed} {best.value:.4f}, the best")
    return True


def _folder(run: Run, step: int) -> Path:
    return run.folder.checkpoints / f"step-{step}"
