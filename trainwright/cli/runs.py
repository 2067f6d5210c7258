"""`trainwright runs list | show | compare`"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trainwright.base.errors import ConfigError
from trainwright.base.text import align_columns, human_bytes, human_count, human_duration
from trainwright.cli.run_folder import RunSummary, evaluations, find_run, list_runs, own_metric, read_run

__all__ = ["app", "compare_lines", "list_lines", "show_lines"]

app = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)
Root = Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")]


@app.command("list")
def list_(root: Root = Path("runs")) -> None:
    """Every run: status, progress, loss, the task's metric, speed."""
    print("\n".join(list_lines(root)))


@app.command()
def show(run: RunName, root: Root = Path("runs")) -> None:
    """One run in detail: what it was, what came out, evaluations, checkpoints."""
    print("\n".join(show_lines(find_run(run, root))))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Names or folders of runs.")],
    root: Root = Path("runs"),
) -> None:
    """Recipes side by side where they differ, then the results."""
    if len(runs) < 2:
        raise ConfigError(f"one run, {runs[0]!r}, expected two or more to compare")
    print("\n".join(compare_lines([find_run(run, root) for run in runs])))


def list_lines(root: Path) -> list[str]:
    """The table of `runs list`."""
    runs = list_runs(root)
    if not runs:
        return [f"no runs in {root}", "  -> trainwright train stdlib makes the first"]
    header = ("run", "status", "started", "params", "steps", "tokens", "loss", "best", "metric", "tok/s", "time")
    return align_columns([header, *(_row(run) for run in runs)], right=range(3, len(header)))


def _row(run: RunSummary) -> tuple[str, ...]:
    return (
        run.name,
        run.status,
        run.started[:16].replace("T", " "),
        _count(run.parameters),
        _steps(run),
        _count(run.tokens),
        _loss(run.validation_loss),
        _loss(run.best_loss),
        "-" if run.best_metric is None else f"{run.metric} {_metric(run.best_metric)}",
        _count(run.speed),
        _time(run.seconds),
    )


def _count(value: float | None) -> str:
    return "-" if value is None else human_count(value)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _metric(value: float | None) -> str:
    """Four digits behind the point of fractions, two of scores up to 100."""
    return "-" if value is None else f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def _time(value: float | None) -> str:
    return "-" if value is None else human_duration(value)


def _steps(run: RunSummary) -> str:
    if run.step is None:
        return "-"
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def show_lines(path: Path) -> list[str]:
    """The page of `runs show`."""
    run = read_run(path)
    info = run.info
    environment, machine = info.get("environment") or {}, info.get("machine") or {}
    git = environment.get("git") or {}
    revision = f"{git['revision'][:12]}{' (modified)' if git.get('modified') else ''}" if git.get("revision") else "-"
    recipe = _recipe_values(path)
    task = str(recipe.get("task.name") or recipe.get("task") or "causal_lm")
    counted = _counted(task)
    rows = [
        ("run", run.name),
        ("folder", str(path)),
        ("status", ", ".join(filter(None, (run.status, (info.get("result") or {}).get("stopped_early"))))),
        ("started", run.started),
        ("machine", f"{machine.get('name', '-')}, {machine.get('cores', '-')} cores"),
        ("versions", ", ".join(f"{key} {value}" for key, value in (environment.get("packages") or {}).items())),
        ("revision", revision),
        ("parameters", _count(run.parameters)),
        ("steps", _steps(run)),
        (counted, _count(run.tokens)),
        ("time", _time(run.seconds)),
        ("speed", _speed(run, counted)),
        ("loss", f"{_loss(run.validation_loss)} (best {_loss(run.best_loss)})"),
    ]
    if run.metric is not None:
        rows.append((run.metric, f"{_metric(run.last_metric)} (best {_metric(run.best_metric)})"))
        rows += [(f"{split} {run.metric}", f"{_metric(value)} at the end") for split, value in run.reported.items()]
    description = recipe.get("run.description")
    if description:
        rows.insert(1, ("about", str(description)))
    lines = align_columns(rows)
    lines += _evaluation_lines(path, counted) + _checkpoint_lines(path)
    errors = [session["error"] for session in info.get("sessions") or [] if session.get("error")]
    lines += [f"error: {error}" for error in errors]
    return lines + _next_lines(run, task)


def _counted(task: str) -> str:
    """What a task of this name is trained on, in a word: tokens, texts, words."""
    from trainwright.config.tasks import TASKS

    return TASKS[task].counted if task in TASKS else "tokens"


def _speed(run: RunSummary, counted: str) -> str:
    """What was read a second, and what was trained, which is what the plan predicts, where that is another number."""
    text = f"{_count(run.speed)} tokens/s"
    trained = f"{_count(run.tokens_per_second)} {counted}/s"
    if trained != text:
        text += f" read, {trained} trained"
    rate = (run.info.get("predicted") or {}).get("tokens_per_second")
    return f"{text} (predicted {human_count(rate)})" if rate else text


def _evaluation_lines(path: Path, counted: str, shown: int = 10) -> list[str]:
    records = evaluations(path)
    if not records:
        return []
    metric = next((str(r["metric"]) for r in reversed(records) if own_metric(r) is not None), None)
    header = ("step", counted, "loss", "perplexity" if metric is None else metric)
    rows = [
        (
            str(r.get("step", "-")),
            _count(r.get("tokens")),
            _loss(r.get("loss")),
            _number(r.get("perplexity")) if metric is None else _metric(own_metric(r)),
        )
        for r in records[-shown:]
    ]
    title = f"evaluations ({len(records)}{f', last {shown} shown' if len(records) > shown else ''})"
    baselines = ", ".join(f"{name} {_loss(loss)}" for name, loss in (records[-1].get("baselines") or {}).items())
    lines = ["", title, *(f"  {line}" for line in align_columns([header, *rows], right=range(4)))]
    return [*lines, f"  baselines on the same tokens: {baselines}"] if baselines else lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _checkpoint_lines(path: Path) -> list[str]:
    from trainwright.checkpoint import list_checkpoints

    found = list_checkpoints(path / "checkpoints")
    if not found:
        return []
    rows = [(f"step {c.step}", human_bytes(c.bytes) if c.complete else "", c.problem or "") for c in found]
    return ["", "checkpoints", *(f"  {line}" for line in align_columns(rows))]


def _next_lines(run: RunSummary, task: str) -> list[str]:
    from trainwright.config.tasks.commands import use_commands

    if (run.path / "model" / "config.json").is_file():
        splits = tuple(run.reported) or ("validation",)
        return ["", "use it:", *(f"  {command}" for command in use_commands(task, run.path, splits))]
    if run.status in ("interrupted", "died", "failed"):
        folder = shlex.quote(str(run.path))
        return ["", f"go on:  trainwright train {folder} --resume {folder}"]
    return []


def _recipe_values(path: Path) -> dict[str, Any]:
    """Dotted values of a run's resolved recipe; {} before it is written or when this version cannot read it."""
    from trainwright.config import load_recipe

    if not (path / "recipe.resolved.yaml").is_file():
        return {}
    try:
        return load_recipe(path / "recipe.resolved.yaml").values()
    except ConfigError:
        return _flat_yaml(path / "recipe.resolved.yaml")


def _flat_yaml(path: Path) -> dict[str, Any]:
    """The values of a recipe that another version wrote, as they stand."""
    from trainwright.config.problems import dotted
    from trainwright.config.provenance import leaves
    from trainwright.config.yaml_file import YamlProblem, read_yaml

    try:
        return {dotted(key): value for key, value in leaves(read_yaml(path.read_text(encoding="utf-8")).value or {})}
    except (YamlProblem, UnicodeDecodeError):
        return {}


def compare_lines(paths: Sequence[Path]) -> list[str]:
    """The page of `runs compare`: differing recipe values, then results; the best of each is marked with *."""
    from trainwright.config.yaml_file import dump_inline

    runs = [read_run(path) for path in paths]
    values = [_recipe_values(path) for path in paths]
    keys = list(dict.fromkeys(key for one in values for key in one))
    differing = [
        (key, *(dump_inline(one[key]) if key in one else "-" for one in values))
        for key in keys
        if not key.startswith("run.") and len({repr(one.get(key)) for one in values}) > 1
    ]
    names = [run.name for run in runs]
    lines = align_columns([("recipe", *names), *differing]) if differing else ["the recipes are the same"]
    results = [
        ("status", *(run.status for run in runs)),
        ("final loss", *_marked([run.validation_loss for run in runs], _loss, low=True)),
        ("best loss", *_marked([run.best_loss for run in runs], _loss, low=True)),
        *_metric_rows(runs),
        ("steps", *(_steps(run) for run in runs)),
        ("tokens", *(_count(run.tokens) for run in runs)),
        ("tokens/s", *_marked([run.speed for run in runs], _count, low=False)),
        ("time", *(_time(run.seconds) for run in runs)),
    ]
    return [*lines, "", *align_columns([("result", *names), *results])]


def _metric_rows(runs: Sequence[RunSummary]) -> list[tuple[str, ...]]:
    """The metrics of the runs' tasks: the best of the evaluations, and those of the reports at the end."""
    rows = []
    for metric in dict.fromkeys(run.metric for run in runs if run.metric is not None):
        of_it = [run if run.metric == metric else RunSummary(run.path, run.status) for run in runs]
        rows.append((f"best {metric}", *_marked([run.best_metric for run in of_it], _metric, low=False)))
        for split in dict.fromkeys(split for run in of_it for split in run.reported):
            values = [run.reported.get(split) for run in of_it]
            rows.append((f"{split} {metric} at the end", *_marked(values, _metric, low=False)))
    return rows


def _marked(values: Sequence[float | None], text: Any, *, low: bool) -> list[str]:
    present = [value for value in values if value is not None]
    best = (min(present) if low else max(present)) if len(set(present)) > 1 else None
    return [f"{text(value)}{' *' if best is not None and value == best else ''}" for value in values]
