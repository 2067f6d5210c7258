"""Early stopping and the best evaluation: which metric, which way, what is remembered, what the sections mean."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.metric_names import less_is_better
from trainwright.comm import ALONE
from trainwright.config import load_recipe
from trainwright.tasks.task import Metric
from trainwright.trainer.best import Best, best_callback
from trainwright.trainer.callbacks import EarlyStopping, followed_metric
from trainwright.trainer.evaluation import Evaluation

F1 = Metric("f1", higher=True)


class Checkpoints:
    """Stands for the Checkpointer: what is protected, and whether a save is going on."""

    def __init__(self) -> None:
        self.protected: set[int] = set()
        self.is_busy = False

    def protect(self, step: int) -> None:
        self.protected.add(step)

    def unprotect(self, step: int) -> None:
        self.protected.discard(step)


def run_of(tmp_path: Path, best: Metric = F1) -> Any:
    return SimpleNamespace(
        task=SimpleNamespace(best=best),
        state=SimpleNamespace(step=0),
        stop_reason=None,
        save_wanted=False,
        ranks=ALONE,
        checkpointer=Checkpoints(),
        folder=SimpleNamespace(checkpoints=tmp_path),
    )


def evaluated(run: Any, callback: Any, step: int, loss: float = 1.0, **metrics: float) -> None:
    run.state.step = step
    callback.on_evaluation(run, Evaluation(loss, 10, metrics))


def stopped_after(callback: EarlyStopping, run: Any, values: list[dict[str, float]]) -> int | None:
    for number, given in enumerate(values, start=1):
        evaluated(run, callback, number, **given)
        if run.stop_reason:
            return number
    return None


def test_early_stopping_goes_by_the_metric_of_the_task_and_its_direction(tmp_path: Path) -> None:
    rising = [{"f1": 0.5, "loss": 1.0}, {"f1": 0.6, "loss": 2.0}, {"f1": 0.7, "loss": 3.0}, {"f1": 0.6, "loss": 0.1}]
    run = run_of(tmp_path)
    assert stopped_after(EarlyStopping(patience=1), run, rising) == 4
    assert run.stop_reason == "f1 has not got better than 0.7000 in 1 evaluation"
    assert stopped_after(EarlyStopping(patience=1, metric="loss"), run_of(tmp_path), rising) == 2
    by_loss = run_of(tmp_path)
    assert stopped_after(EarlyStopping(patience=2, metric="loss"), by_loss, rising) == 3
    assert by_loss.stop_reason == "validation loss has not got better than 1.0000 in 2 evaluations"
    demanding = run_of(tmp_path)
    assert stopped_after(EarlyStopping(patience=1, min_delta=0.2), demanding, rising) == 2
    assert demanding.stop_reason == "f1 has not got better than 0.5000 by more than 0.2 in 1 evaluation"


def test_without_a_metric_of_its_own_a_task_goes_by_the_loss(tmp_path: Path) -> None:
    falling = [{"loss": 3.0}, {"loss": 2.0}, {"loss": 2.5}]
    assert stopped_after(EarlyStopping(patience=1), run_of(tmp_path, Metric()), falling) == 3
    # A score of generated texts is not taken in every evaluation: then it is the loss as well.
    assert stopped_after(EarlyStopping(patience=1), run_of(tmp_path, Metric("bleu", True)), falling) == 3


def test_a_metric_that_is_not_a_number_is_no_improvement(tmp_path: Path) -> None:
    nan = [{"f1": 0.5}, {"f1": float("nan")}, {"f1": float("nan")}]
    assert stopped_after(EarlyStopping(patience=2), run_of(tmp_path), nan) == 3


def test_early_stopping_goes_on_where_it_stood(tmp_path: Path) -> None:
    run, first = run_of(tmp_path), EarlyStopping(patience=3)
    for step, value in enumerate((0.5, 0.4, 0.3), start=1):
        evaluated(run, first, step, f1=value)
    second = EarlyStopping(patience=3)
    second.load_state_dict(first.state_dict())
    evaluated(run, second, 4, f1=0.45)
    assert run.stop_reason is not None
    older = EarlyStopping(patience=2)
    older.load_state_dict({"best": 2.0, "waited": 1})  # of a checkpoint that knew the loss alone
    late = run_of(tmp_path, Metric())
    evaluated(late, older, 5, loss=2.1)
    assert late.stop_reason is not None


def test_a_run_that_had_stopped_early_trains_no_further_when_it_is_resumed(tmp_path: Path) -> None:
    run, first = run_of(tmp_path), EarlyStopping(patience=2)
    assert stopped_after(first, run, [{"f1": 0.5}, {"f1": 0.4}, {"f1": 0.3}]) == 3
    for patience, stops in ((2, True), (3, False)):  # more patience since then lets it go on
        again, second = run_of(tmp_path), EarlyStopping(patience=patience)
        second.load_state_dict(first.state_dict())
        second.on_run_start(again)
        assert (again.stop_reason is not None) is stops
    fresh = run_of(tmp_path)
    EarlyStopping(patience=1).on_run_start(fresh)
    assert fresh.stop_reason is None


def test_of_equal_values_the_first_is_the_best_and_the_second_no_improvement(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best()
    for step, value in ((4, float("nan")), (8, 0.5), (12, 0.5)):
        evaluated(run, best, step, f1=value)
    assert (best.step, best.value) == (8, 0.5)
    assert stopped_after(EarlyStopping(patience=1), run_of(tmp_path), [{"f1": 0.5}, {"f1": 0.5}]) == 2


def test_where_less_is_better_the_least_is_kept(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best("hamming_loss")
    for step, value in ((4, 0.3), (8, 0.1), (12, 0.2)):
        evaluated(run, best, step, f1=0.5, hamming_loss=value)
    assert (best.step, best.value) == (8, 0.1)
    worse = [{"hamming_loss": 0.1}, {"hamming_loss": 0.2}]
    assert stopped_after(EarlyStopping(patience=1, metric="hamming_loss"), run_of(tmp_path), worse) == 2


def test_which_metric_a_name_means() -> None:
    task: Any = SimpleNamespace(best=F1)
    result = Evaluation(1.0, 10, {"f1": 0.5, "mse": 2.0, "accuracy": 0.7})
    assert followed_metric("auto", task, result) == F1
    assert followed_metric("accuracy", task, result) == Metric("accuracy", higher=True)
    assert followed_metric("mse", task, result) == Metric("mse", higher=False)
    assert followed_metric("loss", task, result) == Metric()
    with pytest.raises(ConfigError, match=r"no metric is called 'f2'.*f1"):
        followed_metric("f2", task, result)


@pytest.mark.parametrize(
    ("name", "less"),
    [("loss", True), ("head_loss", True), ("rmse", True), ("WER", True), ("f1", False), ("glossary_recall", False)],
)
def test_errors_are_told_by_their_names(name: str, less: bool) -> None:
    assert less_is_better(name) is less


def test_the_best_asks_for_a_checkpoint_and_holds_the_one_before_until_it_is_there(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best()
    best.on_run_start(run)
    evaluated(run, best, 4, f1=0.5)
    assert run.save_wanted
    assert run.checkpointer.protected == {4}
    (tmp_path / "step-4").mkdir()
    run.save_wanted = False
    evaluated(run, best, 8, f1=0.4)
    assert not run.save_wanted
    evaluated(run, best, 12, f1=0.6)
    assert run.save_wanted
    assert run.checkpointer.protected == {4, 12}
    best.on_step_end(run, None)  # type: ignore[arg-type]
    assert run.checkpointer.protected == {4, 12}, "step 12 is not on the disk"
    evaluated(run, best, 16, f1=0.7)  # the save of step 12 has failed
    assert run.checkpointer.protected == {4, 16}
    (tmp_path / "step-16").mkdir()
    best.on_step_end(run, None)  # type: ignore[arg-type]
    assert run.checkpointer.protected == {16}
    assert (best.value, best.step, best.followed) == (0.7, 16, "f1")


def test_the_best_is_known_after_a_resume_and_protected_again(tmp_path: Path) -> None:
    run, first = run_of(tmp_path), Best()
    evaluated(run, first, 4, f1=0.5)
    (tmp_path / "step-4").mkdir()
    again, second = run_of(tmp_path), Best()
    second.load_state_dict(first.state_dict())
    second.on_run_start(again)
    assert again.checkpointer.protected == {4}
    evaluated(again, second, 8, f1=0.45)
    assert second.step == 4


def test_of_equal_values_the_one_of_less_loss_is_the_best(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best()
    for step, f1, loss in ((4, 0.0, 2.0), (8, 0.0, 1.5), (12, 0.0, 1.6), (16, 0.0, math.nan), (20, 0.5, 9.0)):
        run.state.step = step
        best.on_evaluation(run, Evaluation(loss, 10, {"f1": f1}))
        assert best.step == {4: 4, 20: 20}.get(step, 8)


def test_a_best_checkpoint_that_is_gone_is_looked_for_anew(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best()
    best.load_state_dict({"metric": "f1", "value": 0.9, "step": 4})
    best.on_run_start(run)
    evaluated(run, best, 8, f1=0.5)
    assert (best.value, best.step) == (0.5, 8)


def test_another_metric_starts_over(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best("accuracy")
    best.load_state_dict({"metric": "f1", "value": 0.9, "step": 4})
    (tmp_path / "step-4").mkdir()
    best.on_run_start(run)
    evaluated(run, best, 8, f1=0.5, accuracy=0.3)
    assert (best.followed, best.value, best.step) == ("accuracy", 0.3, 8)


def test_nothing_is_kept_where_nothing_is_wanted(tmp_path: Path) -> None:
    run, best = run_of(tmp_path), Best(keep=False)
    evaluated(run, best, 4, f1=0.5)
    assert not run.save_wanted
    assert run.checkpointer.protected == set()
    assert best.value == 0.5


def made(overrides: list[str], best: Metric = F1, validated: bool = True) -> Best:
    base = {"model": {"preset": "llama-1m"}, "data": {"source": "python-stdlib"}}
    task: Any = SimpleNamespace(best=best)
    return best_callback(load_recipe(base, overrides).recipe, task, validated=validated)


@pytest.mark.parametrize(
    ("overrides", "best", "keep", "exports"),
    [
        ([], F1, True, True),
        ([], Metric(), False, False),
        (["train.early_stopping={patience: 2}"], Metric(), True, True),
        (["train.export=best"], Metric(), True, True),
        (["train.export=last"], F1, True, False),
        (["checkpoint.keep_best=true"], Metric(), True, True),
        (["checkpoint.keep_best=false"], F1, False, False),
        (["checkpoint.keep_best={metric: loss}"], F1, True, True),
    ],
)
def test_what_the_sections_ask_for(overrides: list[str], best: Metric, keep: bool, exports: bool) -> None:
    found = made(overrides, best)
    assert (found.keep, found.exports) == (keep, exports)


def test_the_best_goes_by_what_early_stopping_goes_by_unless_told_otherwise() -> None:
    stopping = "train.early_stopping={patience: 2, metric: accuracy}"
    assert made([stopping]).metric == "accuracy"
    assert made([stopping, "checkpoint.keep_best={metric: f1}"]).metric == "f1"
    assert made(["train.export=best"]).metric == "auto"


@pytest.mark.parametrize(
    ("overrides", "validated"),
    [
        (["train.export=best", "checkpoint.keep_best=false"], True),
        (["train.export=best"], False),
        (["checkpoint.keep_best=true"], False),
    ],
)
def test_contradictions_are_refused(overrides: list[str], validated: bool) -> None:
    with pytest.raises(ConfigError):
        made(overrides, validated=validated)


def test_without_validation_nothing_is_kept() -> None:
    assert not made([], validated=False).keep
