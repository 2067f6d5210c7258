"""Reading run folders: what a run was, how far it came and how well it did. Nothing here writes, or needs torch."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.base.text import did_you_mean

__all__ = ["RunSummary", "evaluations", "find_run", "list_runs", "own_metric", "read_metrics", "read_run"]


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance. Numbers that the run has not written yet are None.

    Attributes:
        status: running, finished, interrupted, diverged, failed, or "died" when its process is gone without a word.
        step, total_steps, tokens, seconds: how far it came.
        validation_loss, best_loss: mean nats per token, last and lowest.
        tokens_per_second, inputs_per_second: trained, and read by the model; measured in steady state.
        metric: name of the task's own metric, of which more is better; None where it is the loss.
        last_metric, best_metric: in the evaluations. reported: at the end, by split.
        info: all of run.json.
    """

    path: Path
    status: str
    started: str = ""
    parameters: int | None = None
    step: int | None = None
    total_steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    tokens_per_second: float | None = None
    inputs_per_second: float | None = None
    metric: str | None = None
    last_metric: float | None = None
    best_metric: float | None = None
    reported: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def speed(self) -> float | None:
        """Tokens a second that the model reads; the trained ones where the run did not count these."""
        return self.inputs_per_second or self.tokens_per_second


def list_runs(root: Path) -> list[RunSummary]:
    """Every run in a folder, oldest first; a run.json that cannot be read is a run with the status "unreadable"."""
    runs = []
    for path in sorted(root.glob("*/run.json")) if root.is_dir() else ():
        try:
            runs.append(read_run(path.parent))
        except ConfigError:
            runs.append(RunSummary(path.parent, "unreadable"))
    return sorted(runs, key=lambda run: (run.started, run.name))


def find_run(name: str, root: Path) -> Path:
    """The folder that `name` means: a path, or the name of a run in `root`.

    Raises:
        ConfigError: there is no such run; says which name is close.
    """
    for path in (Path(name), root / name):
        if (path / "run.json").is_file():
            return path
    names = [run.name for run in list_runs(root)]
    raise ConfigError(
        f"there is no run {name!r}: neither {name} nor {root / name} holds a run.json.{did_you_mean(name, names)}",
        hint=f"runs in {root}: {', '.join(names) or 'none'}",
    )


def read_run(path: Path) -> RunSummary:
    """Summarise a run folder from run.json and, for what is newer than that, metrics.jsonl.

    Raises:
        ConfigError: run.json is missing or not a JSON object.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path / 'run.json'} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path / 'run.json'} is not JSON: {error}") from None
    if not isinstance(info, dict):
        raise ConfigError(f"{path / 'run.json'} holds a {type(info).__name__}, expected an object")
    result, measured = info.get("result") or {}, info.get("measured") or {}
    last: dict[str, dict[str, Any]] = {}
    losses: list[float] = []
    metric: str | None = None
    values: list[float] = []
    reported: dict[str, float] = {}
    for record in read_metrics(path):
        last[record.get("kind", "")] = record
        if record.get("kind") == "eval" and isinstance(record.get("loss"), (int, float)):
            losses.append(record["loss"])
        if (value := own_metric(record)) is not None:
            metric = str(record["metric"])
            if record.get("kind") == "eval":
                values.append(value)
            else:
                reported[str(record.get("split"))] = value
    step, start = last.get("step", {}), last.get("run.start", {})
    running = info.get("status") == "running"

    def newest(key: str, source: str, written: Any) -> Any:
        """While a run is going on its metrics are newer than run.json; afterwards run.json has the last word."""
        live = last.get(source, {}).get(key)
        return live if (running and live is not None) or written is None else written

    return RunSummary(
        path=path,
        status=_status(info),
        started=str((info.get("sessions") or [{}])[0].get("started") or _environment(info).get("started", "")),
        parameters=info.get("parameters"),
        step=newest("step", "step", result.get("steps")),
        total_steps=step.get("total_steps", start.get("total_steps")),
        tokens=newest("tokens", "step", result.get("tokens")),
        seconds=result.get("seconds"),
        validation_loss=newest("loss", "eval", result.get("validation_loss")),
        best_loss=min(losses, default=result.get("best_loss")),
        tokens_per_second=newest("tokens_per_second", "step", measured.get("tokens_per_second")),
        inputs_per_second=newest("inputs_per_second", "step", measured.get("inputs_per_second")),
        metric=metric,
        last_metric=values[-1] if values else None,
        best_metric=max(values, default=None),
        reported=reported,
        info=info,
    )


def own_metric(record: dict[str, Any]) -> float | None:
    """The task's own metric in a record of an evaluation or a report; None where that is the loss, or no number."""
    found = record.get("metrics")
    value = found.get(record.get("metric")) if isinstance(found, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _environment(info: dict[str, Any]) -> dict[str, Any]:
    found = info.get("environment")
    return found if isinstance(found, dict) else {}


def _status(info: dict[str, Any]) -> str:
    """The status written, corrected where its process died without writing another."""
    status = str(info.get("status", "unknown"))
    environment = _environment(info)
    pid = environment.get("pid")
    if status == "running" and isinstance(pid, int) and environment.get("host") == platform.node() and not _alive(pid):
        return "died"
    return status


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl in order; a line cut off by a crash, or damaged, is passed over."""
    from trainwright.monitor.records import from_json_line

    try:
        file = (path / "metrics.jsonl").open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                yield from_json_line(line)
            except ValueError:  # UnicodeDecodeError and JSONDecodeError are both
                continue


def evaluations(path: Path) -> list[dict[str, Any]]:
    """The `eval` records of a run, oldest first."""
    return [record for record in read_metrics(path) if record.get("kind") == "eval"]
