"""Enter a run folder, fresh or to continue, and put a continued run back exactly where it stood."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.base.events import emit
from trainwright.checkpoint import RunLock
from trainwright.checkpoint.loading import Loaded
from trainwright.comm import ALONE, Ranks
from trainwright.config import LoadedRecipe, ParallelSection, load_recipe
from trainwright.config.pipeline_section import PipelineSection
from trainwright.models.adapters import BaseModel
from trainwright.trainer.run import Run
from trainwright.trainer.run_folder import RunFolder, find_run
from trainwright.trainer.together import first_decides

__all__ = ["Entered", "enter_folder", "restore"]

FREE_TO_CHANGE = (
    "checkpoint.",
    "monitor.",
    "run.",
    "data.cache",
    "data.workers",
    "train.threads",
    "train.micro_batch",
    "train.export",
    "parallel.",
    "memory.",
    "comm.",
    "launch.",
)
"""Keys that a resumed run may set anew: none decides which rows are trained in which step, or what is computed (how it
is divided over threads, micro-batches and ranks may change the last bits)."""

SETTLED_ANEW = ("train.threads", "train.micro_batch", "parallel.")
"""Those of them that the planner decided and decides again where the layout or the number of ranks has changed."""


@dataclass(frozen=True)
class Entered:
    """A run folder that is held.

    Attributes:
        folder: the folder, locked for this process.
        lock: the lock itself; None on ranks other than 0, which holds it for all.
        loaded: the recipe to settle: the given one, or the folder's resolved one with the changes that are allowed.
        given: the values that somebody set, by dotted key, for the next resume to compare with.
        resuming: whether there is something to continue.
    """

    folder: RunFolder
    lock: RunLock | None
    loaded: LoadedRecipe
    given: dict[str, Any]
    resuming: bool


def enter_folder(loaded: LoadedRecipe, resume: str, stack: contextlib.ExitStack, ranks: Ranks = ALONE) -> Entered:
    """Find or make the run's folder and lock it; rank 0 does, for all ranks.

    Raises:
        RunInUseError: another process holds it.
        ConfigError: a resume with values that change what is computed, or of a run that has finished.
    """
    run = loaded.recipe.run
    lock: RunLock | None = None

    def find() -> dict[str, Any]:
        nonlocal lock
        folder, resuming = find_run(Path(run.dir), run.name or _name_of(loaded), resume=resume)
        lock = RunLock(folder.path)
        stack.callback(lock.release)
        return {"folder": str(folder.path), "resuming": resuming, "info": folder.read_info() if resuming else {}}

    found = first_decides(ranks, find)
    folder, resuming, info = RunFolder(Path(found["folder"])), bool(found["resuming"]), dict(found["info"])
    given = {
        key: loaded.values()[key]
        for key, origin in loaded.provenance.items()
        if origin.kind in ("file", "override", "smoke", "dict")
    }
    if not resuming:
        return Entered(folder, lock, loaded, given, resuming=False)
    if info.get("status") == "finished":
        raise ConfigError(
            f"{folder.path} has finished; there is nothing to resume",
            hint="start a new run with --resume never, or under another run.name",
        )
    before = info.get("given", {})
    resolved = load_recipe(folder.recipe).values()
    _refuse_changes(before, loaded.values(), resolved, given, folder)
    changes = [f"{key}={_yaml(value)}" for key, value in given.items() if _may_change(key) and before.get(key) != value]
    if info.get("ranks", 1) != ranks.world or any(change.startswith("parallel.") for change in changes):
        changes += _settled_anew(before, resolved, given)
    return Entered(folder, lock, load_recipe(folder.recipe, changes), before | given, resuming=True)


def _settled_anew(before: dict[str, Any], resolved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What a changed layout does not keep: what nobody said, and what was said of a degree that is gone."""
    said = before | given
    keys = [key for key in resolved if key.startswith(SETTLED_ANEW) and given.get(key, "auto") == "auto"]
    layout = {key: value for key, value in (resolved | given).items() if key.startswith("parallel.")}
    gone = _without_effect(layout)
    anew = {key: _default(key) if key in gone else said.get(key, _default(key)) for key in keys}
    return [f"{key}={_yaml(value)}" for key, value in anew.items() if value != resolved[key]]


def _without_effect(layout: dict[str, Any]) -> set[str]:
    """Keys of a layout, not checked yet, that have no effect in it; and those that belong to other degrees."""
    inner, outer = "parallel.pipeline.", "parallel."
    stages = {key.removeprefix(inner): value for key, value in layout.items() if key.startswith(inner)}
    others = {key.removeprefix(outer): value for key, value in layout.items() if not key.startswith(inner)}
    pipeline = PipelineSection.model_construct(**stages)
    section = ParallelSection.model_construct(**{**others, "pipeline": pipeline})
    gone = {outer + key for key in section.without_effect()} | {inner + key for key in pipeline.without_effect()}
    gone |= {outer + key for key, _ in section.problems()} | {inner + key for key, _ in pipeline.problems()}
    return gone


def _default(key: str) -> Any:
    value: Any = "auto"
    if key.startswith("parallel."):
        value = ParallelSection()
        for name in key.split(".")[1:]:
            value = getattr(value, name)
    return value


def _name_of(loaded: LoadedRecipe) -> str:
    return loaded.source_path.stem if loaded.source_path is not None else "run"


_ABSENT = object()


def _may_change(key: str) -> bool:
    return key.startswith(FREE_TO_CHANGE)


def _refuse_changes(
    before: dict[str, Any], now: dict[str, Any], resolved: dict[str, Any], given: dict[str, Any], folder: RunFolder
) -> None:
    """Every value that was or is given must be what it was, as written ("3 min") or as resolved (220 steps)."""
    changed = [
        f"{key}: the run has {resolved.get(key, before.get(key))!r}, the recipe now says {now.get(key)!r}"
        for key in sorted(set(before) | set(given))
        if not _may_change(key) and now.get(key) not in (before.get(key, _ABSENT), resolved.get(key))
    ]
    if changed:
        raise ConfigError(
            f"{folder.path} cannot be resumed with other values:\n  " + "\n  ".join(changed),
            hint="set them back, or start a new run under another run.name",
        )


def _yaml(value: Any) -> str:
    import yaml

    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )


def restore(run: Run) -> None:
    """Load the newest good checkpoint, if there is one; damaged ones are reported by name and passed over.

    Raises:
        DataError: the dataset is not the one the run was trained on.
        CheckpointError: no checkpoint is whole, its tensors are not this model's, or the model that its adapters
            stand beside has changed.
    """
    found = run.checkpointer.load_latest(like=run.state_dict() if run.ranks.world > 1 else None)
    if found is None:
        emit("warning", message=f"no checkpoint in {run.folder.checkpoints} yet: starting from the first step")
        return
    _refuse_another_base(run, found)
    try:
        run.load_state_dict(found.state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{found.path} does not fit this run: {error}",
            hint="resume with the recipe, code and data it was made with",
        ) from error
    emit("resume", path=str(found.path), step=run.state.step, total_steps=run.plan.steps)


def _refuse_another_base(run: Run, found: Loaded) -> None:
    """A checkpoint of adapters is half of a model: the other half must be what it was."""
    if run.base is None or "base" not in found.meta:
        return
    changed = BaseModel(**found.meta["base"]).changed(run.base)
    if changed is not None:
        raise CheckpointError(
            f"{found.path}: {changed}",
            hint="put the weights back that were there when the run began, or start a new run",
        )
