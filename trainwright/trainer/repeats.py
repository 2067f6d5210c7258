"""One recipe, several runs: seeds and folds one after the other, and what their results have in common.

    repeat("recipe.yaml", seeds=3)       # NAME-seed0, NAME-seed1, NAME-seed2, each in its own run folder
    repeat("recipe.yaml", folds=5)       # NAME-fold0 ... NAME-fold4: five-fold cross-validation

Called again it goes on: runs that have finished are not trained again, others are resumed. A run that fails does not
lose the others. `NAME-repeats.json` beside the run folders is rewritten after every run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainwright.base.errors import ConfigError, Interrupted
from trainwright.base.events import emit
from trainwright.base.metric_names import less_is_better
from trainwright.base.text import align_columns
from trainwright.config import LoadedRecipe, load_recipe
from trainwright.config.data_section import ValidationFraction, ValidationSources
from trainwright.monitor import read_history
from trainwright.trainer.resume import FREE_TO_CHANGE
from trainwright.trainer.run_folder import RunFolder, find_run, write_json

__all__ = ["RepeatedRun", "Repeats", "Spread", "repeat"]

REPORTED = ("train.export", "checkpoint.keep_best")
"""Keys that a resumed run may set anew, but that decide which weights a finished one was judged by."""

Metrics = Mapping[str, Mapping[str, float]]
"""Split -> name of a metric -> value."""


@dataclass(frozen=True)
class RepeatedRun:
    """One of the runs.

    Attributes:
        seed, fold: what tells it from the others; fold is None without folds.
        status: "finished", "failed", or "waiting" while it has not had its turn.
        metrics: on the splits "validation" and "test", at the end.
        error: what a failed one ended with.
    """

    name: str
    folder: str
    seed: int
    fold: int | None
    status: str = "waiting"
    metrics: Metrics | None = None
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """One number over all finished runs.

    Attributes:
        deviation: sample standard deviation (n - 1); None for one run.
        worst, best: by the metric's own direction: errors and losses are best where they are least.
        runs: how many it is of.
    """

    mean: float
    deviation: float | None
    worst: float
    best: float
    runs: int


@dataclass(frozen=True)
class Repeats:
    """The runs of a recipe and what came of them."""

    name: str
    path: Path
    runs: tuple[RepeatedRun, ...]

    @property
    def failed(self) -> tuple[RepeatedRun, ...]:
        return tuple(run for run in self.runs if run.status == "failed")

    @property
    def summary(self) -> dict[str, dict[str, Spread]]:
        """Split -> metric -> its spread over the finished runs that have it."""
        values: dict[str, dict[str, list[float]]] = {}
        for run in self.runs:
            for split, metrics in (run.metrics or {}).items():
                for metric, value in metrics.items():
                    values.setdefault(split, {}).setdefault(metric, []).append(value)
        return {
            split: {metric: _spread(metric, found) for metric, found in metrics.items()}
            for split, metrics in values.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """What `NAME-repeats.json` holds."""
        summary = {
            split: {metric: asdict(spread) for metric, spread in metrics.items()}
            for split, metrics in self.summary.items()
        }
        return {"name": self.name, "runs": [asdict(run) for run in self.runs], "summary": summary}

    def table(self) -> list[str]:
        """Lines for a person."""
        finished = sum(run.status == "finished" for run in self.runs)
        lines = [f"{self.name}: {finished} of {len(self.runs)} runs finished"]
        rows = [
            (f"{split} {metric}", *map(_number, (s.mean, s.deviation, s.worst, s.best)), str(s.runs))
            for split, metrics in self.summary.items()
            for metric, s in metrics.items()
        ]
        if rows:
            header = ("metric", "mean", "deviation", "worst", "best", "runs")
            lines += [f"  {line}" for line in align_columns([header, *rows], right=range(1, len(header)))]
        lines += [f"  {run.name} failed: {(run.error or '').splitlines()[0]}" for run in self.failed]
        return [*lines, f"all numbers: {self.path}"]


def repeat(
    recipe: LoadedRecipe | Mapping[str, Any] | str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    folds: int | None = None,
    overrides: Sequence[str] = (),
    train: Callable[[LoadedRecipe, Sequence[str]], object] | None = None,
) -> Repeats:
    """Train a recipe several times, one run after the other.

    Args:
        recipe: as `Trainer` takes it.
        seeds: how many, counted on from the recipe's `train.seed`, or which; None is that one alone.
        folds: k of a k-fold cross-validation: records go to folds by a hash of their keys, and each run validates on
            one fold and trains on the others.
        overrides: `key=value` strings for all runs.
        train: trains one run and returns at its end, given its recipe and the overrides that make it of `recipe`.
            None trains in this process.

    Raises:
        ConfigError: nothing to repeat, or a run of that name has finished with another recipe.
        Interrupted: a run was asked to stop; called again, this goes on with it.
    """
    loaded = load_recipe(recipe, overrides)
    planned = _planned(loaded, seeds, folds)
    variants = [(run, load_recipe(recipe, [*overrides, *own]), own) for run, own in planned]
    for run, variant, _ in variants:
        _refuse_other_recipe(run, variant)
    name = _name(loaded)
    path = Path(loaded.recipe.run.dir) / f"{name}-repeats.json"
    done = [run for run, _, _ in variants]
    for number, (run, variant, own) in enumerate(variants):
        done[number] = _one(run, variant, own, train or _train_here)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, Repeats(name, path, tuple(done)).to_dict())
    return Repeats(name, path, tuple(done))


def _planned(
    loaded: LoadedRecipe, seeds: int | Sequence[int] | None, folds: int | None
) -> list[tuple[RepeatedRun, list[str]]]:
    """The runs, and the overrides that make each of the recipe."""
    base = loaded.recipe.train.seed
    chosen = [base + number for number in range(seeds)] if isinstance(seeds, int) else list(seeds or ())
    if (seeds is None and folds is None) or (seeds is not None and not chosen):
        raise ConfigError("there is nothing to repeat: neither seeds nor folds", hint="seeds=3, or folds=5")
    if len(set(chosen)) != len(chosen) or any(seed < 0 for seed in chosen):
        raise ConfigError(f"seeds {chosen}: expected different numbers of at least 0")
    if folds is not None and folds < 2:
        raise ConfigError(f"folds is {folds}, expected at least 2", hint="5 and 10 are usual")
    shared = [] if folds is None else _validated_on_folds(loaded)
    runs = []
    for seed in chosen or [base]:
        for fold in range(folds) if folds is not None else (None,):
            own = [f"train.seed={seed}", *shared]
            name = _name(loaded) + (f"-seed{seed}" if chosen else "")
            if fold is not None:
                name += f"-fold{fold}"
                own.append(f"data.fold={{index: {fold}, of: {folds}}}")
            own.append(f"run.name={json.dumps(name, ensure_ascii=False)}")
            folder = find_run(Path(loaded.recipe.run.dir), name, resume="auto")[0]
            runs.append((RepeatedRun(name, str(folder.path), seed, fold), own))
    return runs


def _validated_on_folds(loaded: LoadedRecipe) -> list[str]:
    """Overrides that let the folds take the place of the share of the records that the recipe holds out."""
    validation = loaded.recipe.data.validation
    if isinstance(validation, ValidationFraction):
        if loaded.provenance["data.validation.fraction"].kind != "override":
            return ["data.validation=auto"]
        said = f"{{fraction: {validation.fraction:g}}}"
    elif isinstance(validation, ValidationSources):
        said = ", ".join(source.source for source in validation.source)
    elif validation == "auto":
        return []
    else:
        said = validation
    raise ConfigError(
        f"folds are parts of data.source, each validated on in its turn, and data.validation is {said}",
        hint="take it out (data.validation=auto); files that shall be cross-validated too belong in data.source",
    )


def _name(loaded: LoadedRecipe) -> str:
    return loaded.recipe.run.name or "run"


def _refuse_other_recipe(run: RepeatedRun, variant: LoadedRecipe) -> None:
    """A finished run is taken as it is: then it must be of this recipe."""
    folder = RunFolder(Path(run.folder))
    info = folder.read_info()
    if info.get("status") != "finished":
        return
    before, now = info.get("given", {}), variant.values()
    resolved = load_recipe(folder.recipe).values()
    given = {key for key, origin in variant.provenance.items() if origin.kind not in ("default", "rule")}
    changed = [
        f"{key}: the run has {resolved.get(key, before.get(key))!r}, the recipe now says {now.get(key)!r}"
        for key in sorted(set(before) | given)
        if (key.startswith(REPORTED) or not key.startswith(FREE_TO_CHANGE))
        and now.get(key) not in (before.get(key), resolved.get(key))
    ]
    if changed:
        raise ConfigError(
            f"{folder.path} has finished with other values:\n  " + "\n  ".join(changed),
            hint="set another run.name, or remove the finished runs",
        )


def _train_here(loaded: LoadedRecipe, own: Sequence[str]) -> None:
    from trainwright.trainer.trainer import Trainer

    Trainer(loaded, resume="auto").fit()


def _one(
    run: RepeatedRun,
    variant: LoadedRecipe,
    own: Sequence[str],
    train: Callable[[LoadedRecipe, Sequence[str]], object],
) -> RepeatedRun:
    """Train one run, unless it has finished, and read its results."""
    error = None
    if RunFolder(Path(run.folder)).read_info().get("status") != "finished":
        try:
            train(variant, own)
        except Interrupted:
            raise
        except Exception as failure:  # whatever ends one run, the others are worth having
            error = f"{type(failure).__name__}: {failure}"
            emit("warning", code="repeats.failed", message=f"{run.name} failed, the others go on: {error}")
    folder = find_run(Path(variant.recipe.run.dir), run.name, resume="auto")[0]
    status = "failed" if error is not None else "finished"
    metrics = _results(folder) if error is None else None
    return RepeatedRun(run.name, str(folder.path), run.seed, run.fold, status, metrics, error)


def _results(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What a finished run came to: `report.json` where its task wrote one, else its last evaluation."""
    try:
        found = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {}
    results = {split: _numbers(metrics) for split, metrics in found.items() if isinstance(metrics, Mapping)}
    if results:
        return results
    last: Mapping[str, Any] = {}
    if folder.metrics.exists():
        for record in read_history(folder.metrics, "eval"):
            last = record
    metrics = {"loss": last.get("loss"), **(last.get("metrics") or {})}
    return {"validation": numbers} if (numbers := _numbers(metrics)) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _spread(metric: str, values: Sequence[float]) -> Spread:
    low, high = min(values), max(values)
    worst, best = (high, low) if less_is_better(metric) else (low, high)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, worst, best, len(values))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
