"""The run folder, which is the API of a run: who wrote what, where, and how a run is found again.

runs/NAME/
    recipe.resolved.yaml   every value of the recipe after "auto" was resolved
    plan.json              the decisions with their reasons, and the predictions
    run.json               versions, hardware, git revision, seed, status, predicted against measured
    metrics.jsonl          one record a line
    tensorboard/           the same as TensorBoard events
    checkpoints/step-N/    resumable state
    tokenizer/             the tokenizer, so that checkpoints are usable without the dataset
    model/                 the trained model as a Hugging Face folder
    adapter/               trained adapters in peft's format, where `adapter` trains one; model/ has them merged
    report.json            the task's metrics on the validation and test rows, at the end
    reports/               the same in full: SPLIT.txt, SPLIT.json, SPLIT-errors.jsonl, SPLIT-confusion.svg
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trainwright.base.errors import ConfigError
from trainwright.checkpoint.lock import LOCK_NAME

__all__ = ["RunFolder", "environment", "find_run", "write_json"]

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "transformers", "pydantic")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    def read_info(self) -> dict[str, Any]:
        """`run.json`, or {} before the run has written it; ConfigError when it is not JSON."""
        try:
            loaded = json.loads(self.info.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(
                f"{self.info} is not valid JSON: {error}", hint="restore it, or start a new run"
            ) from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{self.info} holds {type(loaded).__name__}, expected an object")
        return loaded

    def update_info(self, **fields: Any) -> None:
        """Merge fields into `run.json`."""
        write_json(self.info, {**self.read_info(), **fields})


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find_run(root: Path, name: str, *, resume: str) -> tuple[RunFolder, bool]:
    """The folder a run writes to, and whether it continues what is there.

    Args:
        root: folder of all runs.
        name: name of the run; a second run of the same name gets `NAME-2`, a third `NAME-3`. A folder of a run that
            never began is taken.
        resume: "never" for a fresh folder; "auto" for the newest folder of that name, or a fresh one when there
            is none; or the path of a run folder, which must exist.
    """
    if resume not in ("never", "auto"):
        folder = RunFolder(Path(resume))
        if not folder.info.exists():
            raise ConfigError(
                f"--resume {resume}: no run there (expected a folder with run.json)",
                hint="`trainwright runs list` shows the runs; --resume auto picks the newest of the recipe's name",
            )
        return folder, True
    number = 1
    newest: RunFolder | None = None
    while (path := root / (name if number == 1 else f"{name}-{number}")).exists():
        if (path / "run.json").exists():
            newest = RunFolder(path)
        elif _is_unused(path):
            break
        number += 1
    if resume == "auto" and newest is not None:
        return newest, True
    return RunFolder(path), False


def _is_unused(path: Path) -> bool:
    """Whether nothing was written there: a run that was refused before it began leaves an empty lock file."""
    return all(entry.name == LOCK_NAME and entry.stat().st_size == 0 for entry in path.iterdir())


def environment(repository: Path | None = None) -> dict[str, Any]:
    """Versions and place, for `run.json`."""
    from trainwright import __version__

    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "trainwright": __version__,
        "python": sys.version.split()[0],
        "packages": packages,
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "git": _git_revision(repository or Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
    }


def _git_revision(folder: Path) -> dict[str, Any] | None:
    """Revision of the work tree around `folder`, and whether it has uncommitted changes; None outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
