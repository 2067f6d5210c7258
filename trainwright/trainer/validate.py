"""Evaluation of a run: loss and the task's own metrics during training, whole reports at its end."""

from __future__ import annotations

from dataclasses import replace

from trainwright.base.events import emit
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.trainer.evaluation import Evaluation, evaluate
from trainwright.trainer.judge import Writer, judge
from trainwright.trainer.outputs import Outputs
from trainwright.trainer.report import write_report
from trainwright.trainer.run import Run
from trainwright.trainer.run_folder import write_json
from trainwright.trainer.writing import engine_writer

__all__ = ["final_reports", "validate"]

WRITTEN_TOGETHER = 32
"""Answers of one batch at least: a token for many costs little more than one for few."""


def validate(run: Run, split: str = "validation", *, whole: bool = False) -> Evaluation:
    """Loss and metrics on a split; a collective of all ranks.

    Args:
        whole: all rows, with answers written for all records; else as many as an evaluation during training has.
    """
    dataset = run.dataset
    batches = run.batches_of(split, None if whole else run.validation_rows)
    if not isinstance(dataset, ExampleDataset):
        return evaluate(run.engine, run.task, batches)
    outputs = Outputs()
    result = evaluate(run.engine, run.task, batches, outputs=outputs)
    answers = run.recipe.train.eval_answers
    limit = None if whole or answers == "all" else answers
    judgement = judge(run.task, dataset, split, outputs, run.ranks, writer=_writer(run), limit=limit)
    if judgement is None:
        return result
    return replace(result, metrics=judgement.metrics, report=judgement.report)


def _writer(run: Run) -> Writer | None:
    """What writes answers; None where no rank has a whole model that reads whole sequences."""
    layout = run.plan.layout
    if layout.pipeline.stages > 1 or layout.tensor > 1 or layout.context > 1:
        return None
    return engine_writer(run.engine, rows=max(run.plan.micro_rows, WRITTEN_TOGETHER), beat=lambda: run.beat("evaluate"))


def final_reports(run: Run) -> None:
    """Judge validation and test rows whole, and write `reports/` and `report.json` of the run folder."""
    dataset = run.dataset
    if not isinstance(dataset, ExampleDataset):
        return
    found = {}
    for split in ("validation", "test"):
        if split not in dataset.splits:
            continue
        result = validate(run, split, whole=True)
        found[split] = {"loss": result.loss, **result.metrics}
        if result.report is not None:
            write_report(run.folder.reports, split, result.report, loss=result.loss)
        emit(
            "report",
            split=split,
            step=run.state.step,
            loss=result.loss,
            metrics=dict(result.metrics),
            metric=run.task.best.name,
        )
    if run.ranks.is_first and found:
        write_json(run.folder.report, found)
