"""What a run writes about itself: the resolved recipe, the plan, `run.json`, and the words at its end."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict

from trainwright.base.events import emit
from trainwright.base.text import human_bytes, human_count, human_duration
from trainwright.config import MonitorSection
from trainwright.config.tasks.commands import use_commands
from trainwright.monitor import ConsoleSink, JsonlSink, Sink, TensorBoardSink
from trainwright.trainer.resume import Entered
from trainwright.trainer.run import Run
from trainwright.trainer.run_folder import environment, write_json
from trainwright.trainer.settle import Settled
from trainwright.trainer.task import save_task

__all__ = ["begin_session", "console_sink", "end_session", "file_sinks"]


def console_sink(section: MonitorSection, memory_total: int) -> ConsoleSink:
    """Progress for a person."""
    return ConsoleSink(section.console, memory_total=memory_total)


def file_sinks(run: Run, *, resuming: bool) -> Sequence[Sink]:
    """`metrics.jsonl` and, where it is installed or asked for, TensorBoard; on resume later records are taken out."""
    resume_step = run.state.step if resuming else None
    sinks: list[Sink] = [JsonlSink(run.folder.metrics, resume_step=resume_step)]
    wanted = run.recipe.monitor.tensorboard
    if wanted is True or (wanted == "auto" and importlib.util.find_spec("tensorboard") is not None):
        sinks.append(TensorBoardSink(run.folder.tensorboard, resume_step=resume_step))
    return sinks


def begin_session(run: Run, entered: Entered, settled: Settled) -> None:
    """Write down what is about to run, before the first step; rank 0 does."""
    if not run.ranks.is_first:
        return
    folder = run.folder
    folder.recipe.write_text(settled.loaded.to_yaml(), encoding="utf-8")
    write_json(folder.plan, settled.plan.to_dict())
    run.tokenizer.save(folder.tokenizer)
    save_task(run.recipe, run.dataset, folder.path, run.ranks)
    sessions = [
        *folder.read_info().get("sessions", []),
        {"started": _now(), "from_step": run.state.step, "status": "running"},
    ]
    folder.update_info(
        name=folder.path.name,
        status="running",
        given=entered.given,
        seed=run.recipe.train.seed,
        ranks=run.ranks.world,
        dataset=run.dataset.fingerprint,
        model=run.model_fields,
        parameters=run.plan.parameters,
        environment=environment(),
        machine=run.plan.machine,
        predicted=asdict(run.plan.prediction),
        sessions=sessions,
    )
    emit(
        "run.start",
        folder=str(folder.path),
        step=run.state.step,
        total_steps=run.plan.steps,
        parameters=run.plan.parameters,
        resumed=run.state.step > 0,
        compiled=bool(run.recipe.train.compile),
        precision=run.recipe.precision.name,
    )


def end_session(run: Run, status: str, *, error: str | None = None) -> None:
    """Write down how this process's part of the run ended; rank 0 does."""
    if not run.ranks.is_first:
        return
    state = run.state
    result = {
        "steps": state.step,
        "tokens": state.tokens,
        "skipped": state.skipped,
        "stopped_early": run.stopped_early,
        "seconds": state.seconds,
        "validation_loss": run.last_evaluation.loss if run.last_evaluation else None,
        "best_loss": state.best_loss if state.best_step >= 0 else None,
        "best_step": state.best_step if state.best_step >= 0 else None,
        "baselines": run.baselines,
    }
    sessions = run.folder.read_info().get("sessions", [])
    if sessions:
        sessions[-1] |= {
            "ended": _now(),
            "to_step": state.step,
            "status": status,
            **({"error": error} if error else {}),
        }
    run.folder.update_info(status=status, result=result, measured=run.measured(), sessions=sessions)
    emit("run.end", status=status, step=state.step, seconds=state.seconds, text=_last_words(run, status))


def _last_words(run: Run, status: str) -> str:
    folder, state, measured = run.folder.path, run.state, run.measured()
    rate, counted = measured["tokens_per_second"], run.recipe.task.counted
    lines = [
        f"{status}: {state.step:,} of {run.plan.steps:,} steps, {human_count(state.tokens)} {counted} in"
        f" {human_duration(state.seconds)}"
        + (
            f", {human_count(rate)} {counted}/s (predicted {human_count(run.plan.prediction.tokens_per_second)})"
            if rate
            else ""
        )
        + f", peak memory {human_bytes(measured['memory_bytes'])}"
    ]
    if run.stopped_early is not None:
        lines.append(run.stopped_early)
    if run.last_evaluation is not None and not run.last_evaluation.metrics:
        against = ", ".join(f"{name} {loss:.3f}" for name, loss in run.baselines.items())
        lines.append(
            f"validation loss {run.last_evaluation.loss:.4f}"
            + (f" (baselines on the same tokens: {against})" if against else "")
        )
    lines.append(f"run folder: {folder}")
    if run.folder.reports.is_dir():
        lines.append(f"tables and errors: {run.folder.reports}")
    if status == "finished":
        lines += ["next:", *_next_commands(run)]
    return "\n".join(lines)


def _next_commands(run: Run) -> list[str]:
    folder, task = run.folder.path, run.recipe.task.name
    more = ["trainwright train YOUR_RECIPE.yaml data.source=YOUR_FILES"] if task == "causal_lm" else []
    shown = f"trainwright runs show {shlex.quote(str(folder))}"
    return [f"  {command}" for command in (*use_commands(task, folder, run.dataset.splits), shown, *more)]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
