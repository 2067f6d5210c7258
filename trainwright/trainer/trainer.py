"""The trainer: one loop for every task, from a recipe to a run folder.

    Trainer("recipe.yaml").fit()

`fit` reads on one screen: settle the plan, build, restore, then the loop of `_train`, then `_finish`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.base.device import device_facts, memory_bytes, peak_memory_bytes
from trainwright.base.errors import DivergedError, Interrupted, MemoryLimitError
from trainwright.base.events import emit
from trainwright.base.faults import fault_point
from trainwright.base.seeds import derive_seed
from trainwright.config import LoadedRecipe, load_recipe
from trainwright.engine import StepReport
from trainwright.monitor import Monitor
from trainwright.trainer.best import Best, take_best_weights
from trainwright.trainer.build import build
from trainwright.trainer.callbacks import Callback, EarlyStopping, followed_metric
from trainwright.trainer.evaluation import Evaluation
from trainwright.trainer.export import export_model
from trainwright.trainer.ranks import agree_on_due, due_together, join_ranks
from trainwright.trainer.records import begin_session, console_sink, end_session, file_sinks
from trainwright.trainer.resume import enter_folder, restore
from trainwright.trainer.run import Run
from trainwright.trainer.settle import settle
from trainwright.trainer.signals import StopRequest
from trainwright.trainer.task import save_task
from trainwright.trainer.validate import final_reports, validate

__all__ = ["RunResult", "Trainer"]


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run folder; `folder/model` is the trained model.
        steps, tokens: optimizer steps and trained tokens done.
        validation_loss: mean nats per token at the end, None without validation rows.
        seconds: spent in training steps.
    """

    folder: Path
    steps: int
    tokens: int
    validation_loss: float | None
    seconds: float


class Trainer:
    """Trains what a recipe describes.

    Args:
        recipe: path of a recipe, name of a built-in one, the same as a dict, or what `load_recipe` returned.
        overrides: `key=value` strings, as on the command line.
        resume: "never", "auto" or the path of a run folder.
        callbacks: called at the moments that `Callback` names, after the built-in ones.
    """

    def __init__(
        self,
        recipe: LoadedRecipe | Mapping[str, Any] | str | Path,
        *,
        overrides: Sequence[str] = (),
        resume: str = "never",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.loaded = recipe if isinstance(recipe, LoadedRecipe) else load_recipe(recipe, overrides)
        self.resume = resume
        self.callbacks = tuple(callbacks)

    def fit(self) -> RunResult:
        """Run to the end of the recipe's budget.

        Raises:
            Interrupted: a stop was requested; everything is saved and the run can be resumed.
            DivergedError: the loss became NaN or spiked and the policy says stop.
            TrainwrightError: of the kinds that `trainwright.base.errors` lists, for input that cannot be used.
        """
        with contextlib.ExitStack() as stack:
            heartbeat, ranks = join_ranks(self.loaded.recipe, stack)
            entered = enter_folder(self.loaded, self.resume, stack, ranks)
            recipe = entered.loaded.recipe
            if ranks.is_first:  # events of the others reach nobody: what they have to say is the same
                stack.enter_context(Monitor([console_sink(recipe.monitor, device_facts().memory_bytes)]))
            settled = settle(entered.loaded, ranks=ranks)
            run = build(settled, entered, self.callbacks, stack, ranks)
            run.heartbeat = heartbeat
            if entered.resuming:
                restore(run)
            if ranks.is_first:
                stack.enter_context(Monitor(file_sinks(run, resuming=entered.resuming)))
            begin_session(run, entered, settled)
            return self._guarded(run)

    def _guarded(self, run: Run) -> RunResult:
        """Train to the end; however it ends, `run.json` says so. Until here Ctrl-C simply ends: nothing is lost."""
        try:
            with StopRequest() as stop:
                self._train(run, stop)
                result = self._finish(run)
        except BaseException as error:
            status = "failed"
            if isinstance(error, Interrupted | DivergedError):
                status = "interrupted" if isinstance(error, Interrupted) else "diverged"
            end_session(
                run, status, error=None if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
            )
            if (explained := _as_memory_error(error, run)) is not None:
                raise explained from error
            raise
        end_session(run, "finished")
        return result

    def _train(self, run: Run, stop: StopRequest) -> None:
        state, plan = run.state, run.plan
        run.start()
        self._refuse_unknown_metrics(run)
        while state.step < plan.steps and run.stop_reason is None:
            run.beat("step")
            began = time.perf_counter()
            batch, waited = run.next_batch()
            inputs = run.inputs_of(batch)
            report = self._step(run, batch)
            previous_tokens = state.tokens
            state.step += 1
            state.tokens += int(report.tokens)
            state.skipped += report.skipped
            state.seconds += (seconds := time.perf_counter() - began)
            run.meter.step(tokens=int(report.tokens), inputs=inputs, seconds=seconds, waited=waited)
            moment = {"step": state.step, "tokens": state.tokens, "previous_tokens": previous_tokens}
            if due_together(run.ranks, run.log_cadence, moment) or state.step in (1, plan.steps):
                self._report(run, report, seconds)
            for callback in run.callbacks:
                callback.on_step_end(run, report)
            due = agree_on_due(run, stop, moment)
            if due.evaluate:
                self.evaluate(run)
            if run.diverged is not None:
                run.save(final=True)
                raise DivergedError(run.diverged, hint="lower optim.lr, raise the warm-up, or set train.on_spike=skip")
            if due.stop:
                run.save(final=True)
                by = stop.requested or "a request to another rank"
                raise Interrupted(
                    f"stopped by {by} after step {state.step} of {plan.steps}; everything is saved",
                    hint=f"go on with: trainwright train {run.folder.path} --resume {run.folder.path}",
                )
            if (due.save or run.save_wanted) and state.step < plan.steps:
                run.save()
        if run.stopped_early is not None:
            emit("notice", message=run.stopped_early)

    def _refuse_unknown_metrics(self, run: Run) -> None:
        """Metrics that the recipe names must be the task's: known by an evaluation before the first step, not after
        hours."""
        named = {callback.metric for callback in run.callbacks if isinstance(callback, EarlyStopping | Best)}
        named -= {"auto", "loss"}
        if named and run.state.step == 0 and run.validation_rows:
            result = validate(run)
            for name in sorted(named):
                followed_metric(name, run.task, result)

    def _step(self, run: Run, batch: Mapping[str, torch.Tensor]) -> StepReport:
        """Forward and backward over the micro-batches of one batch, then one optimizer step."""
        torch.manual_seed(derive_seed(run.recipe.train.seed, "step", run.state.step, run.ranks.rank))
        engine = run.engine
        own = {key: value.to(run.device) for key, value in batch.items()}
        if run.noise is not None:
            run.noise.see(own, engine.data_parallel.mesh.rows[0])
        seed = derive_seed(run.recipe.train.seed, "dropout", run.state.step)
        engine.forward_backward(run.task.loss, own, micro_rows=run.plan.micro_rows, seed=seed)
        if fault_point("step.after_backward", step=run.state.step) == "nan":
            engine.poison()
        report = engine.step(run.guard)
        assert report is not None, "the last micro-batch of a batch ends its step"
        return report

    def _report(self, run: Run, report: StepReport, seconds: float) -> None:
        state, plan, meter = run.state, run.plan, run.meter
        loads = run.engine.load_statistics()
        emit(
            "step",
            step=state.step,
            total_steps=plan.steps,
            tokens=state.tokens,
            loss=float(report.loss),
            grad_norm=float(report.grad_norm),
            lr=report.lr,
            tokens_per_second=meter.tokens_per_second,
            inputs_per_second=meter.inputs_per_second,
            mfu=meter.mfu,
            data_wait=meter.data_wait,
            memory_bytes=memory_bytes(),
            peak_memory_bytes=peak_memory_bytes(),
            eta_seconds=meter.eta_seconds(plan.steps - state.step),
            step_seconds=seconds,
            skipped=report.skipped,
            **loads,
        )

    def evaluate(self, run: Run) -> Evaluation | None:
        """Validation now: loss and the task's metrics; None when the recipe has no validation rows."""
        if not run.validation_rows or run.state.last_evaluation == run.state.step:
            return run.last_evaluation
        result = validate(run)
        state = run.state
        state.evaluations += 1
        state.last_evaluation = state.step
        if result.loss < state.best_loss:
            state.best_loss, state.best_step = result.loss, state.step
        run.last_evaluation = result
        emit(
            "eval",
            step=state.step,
            tokens=state.tokens,
            loss=result.loss,
            perplexity=result.perplexity,
            evaluated_tokens=result.tokens,
            metrics=dict(result.metrics),
            metric=run.task.best.name,
            baselines=run.baselines,
        )
        for callback in run.callbacks:
            callback.on_evaluation(run, result)
        return result

    def _finish(self, run: Run) -> RunResult:
        result = self.evaluate(run)
        if run.recipe.checkpoint.save_final:
            run.save(final=True)
        with run.without_beats("export"):
            take_best_weights(run)
            for callback in run.callbacks:
                callback.on_run_end(run)
            export_model(run)
            save_task(run.recipe, run.dataset, run.folder.model, run.ranks)
            final_reports(run)
        state = run.state
        return RunResult(run.folder.path, state.step, state.tokens, result.loss if result else None, state.seconds)


def _as_memory_error(error: BaseException, run: Run) -> MemoryLimitError | None:
    """What to change when `error` says that memory ran out; None for every other error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in text:
        return None
    rows = run.plan.micro_rows
    smaller = f"train.micro_batch={rows // 2}" if rows > 1 else "a shorter data.sequence_length or a smaller model"
    return MemoryLimitError(
        f"out of memory at step {run.state.step + 1}: {text.splitlines()[0]}",
        hint=f"try {smaller}, or optim.name=adafactor; --resume auto goes on from the last checkpoint",
    )
