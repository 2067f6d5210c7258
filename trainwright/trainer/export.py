"""Export: trained weights and tokenizer as a Hugging Face folder that stands on its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.checkpoint import latest, list_checkpoints
from trainwright.data import Tokenizer, load_tokenizer
from trainwright.engine import readable_weights
from trainwright.inference.export_checkpoint import export_checkpoint
from trainwright.models.exporting import save_weights
from trainwright.models.rewriting import rewrite_folder
from trainwright.trainer.adapters import merged_peft_model, save_adapters
from trainwright.trainer.judge import writes
from trainwright.trainer.run import Run
from trainwright.trainer.run_folder import RunFolder
from trainwright.trainer.task import TASK_FILE, define_task, load_task

__all__ = ["export_model", "export_run"]


def export_model(run: Run) -> Path:
    """Write `model/` of a run that has ended: averaged weights where there are any, else the last ones.

    Adapters go to `adapter/` in peft's format, and are merged into the weights of `model/`.
    """
    folder, model, section = run.folder.model, run.engine.model, run.recipe.adapter
    with run.engine.averaged(), readable_weights(run.engine) as source:
        if source is not None:
            # The tokenizer first: a folder with config.json and weights is complete.
            folder.mkdir(parents=True, exist_ok=True)
            run.tokenizer.save(folder)
            generation = _generation(run.tokenizer, getattr(run.task, "stop_ids", ()))
            merged = save_adapters(
                model, section, source, run.folder.adapter, base=run.pretrained, generation=generation
            )
            if merged is not None:
                save_weights(model.config, merged, folder, generation=generation)
            else:
                assert section is not None, "only methods of peft have to be merged by peft"
                seed = run.recipe.train.seed
                merged_peft_model(model.config, section, source, folder, seed=seed, generation=generation)
    run.ranks.barrier()
    return folder


def export_run(
    run_folder: str | Path,
    destination: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Export a run to `destination`, which must not exist or be empty.

    Args:
        step: the checkpoint to take; None takes the finished model, or the newest good checkpoint of an unfinished run.
        dtype: of the written weights; None keeps that of the stored ones.
        max_shard_bytes: larger models are cut into several files with an index; None is 5 GB.

    Raises:
        ConfigError: no run there, or `destination` is in use.
        CheckpointError: no checkpoint of that step, or none that is whole.
    """
    folder, destination = RunFolder(Path(run_folder)), Path(destination)
    if not folder.info.exists():
        raise ConfigError(
            f"{folder.path} is not a run folder (no run.json)", hint="`trainwright runs list` shows the runs"
        )
    if destination.exists() and any(destination.iterdir()):
        raise ConfigError(f"{destination} is not empty", hint="name a new folder; nothing is overwritten")
    size = 5_000_000_000 if max_shard_bytes is None else max_shard_bytes
    if step is None and (folder.model / "config.json").exists():
        if dtype is not None or max_shard_bytes is not None:
            return rewrite_folder(folder.model, destination, dtype=dtype, max_shard_bytes=size)
        return Path(shutil.copytree(folder.model, destination, dirs_exist_ok=True))
    tokenizer = load_tokenizer(folder.tokenizer)

    def add(place: Path) -> None:
        tokenizer.save(place)
        if (folder.path / TASK_FILE).is_file():
            shutil.copy2(folder.path / TASK_FILE, place / TASK_FILE)

    return export_checkpoint(
        _checkpoint(folder, step),
        destination,
        max_shard_bytes=size,
        dtype=dtype,
        generation=_generation(tokenizer, _stop_ids(folder, tokenizer)),
        add=add,
    )


def _stop_ids(folder: RunFolder, tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens that end the answers of a run's task; none where it writes none."""
    kept = load_task(folder.path)
    definition = None if kept is None else define_task(kept["task"], kept["data"]["sequence_length"])
    if kept is None or definition is None:
        return ()
    task: Any = definition.bind(kept["survey"], tokenizer)
    return task.stop_ids if writes(task) else ()


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The checkpoint folder of a step; None is the newest good one."""
    path = folder.checkpoints / f"step-{step}" if step is not None else latest(folder.checkpoints)
    if path is not None and path.exists():
        return path
    steps = [str(info.step) for info in list_checkpoints(folder.checkpoints)]
    wanted = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
    raise CheckpointError(
        f"{folder.path} has {wanted}",
        hint=f"it has the steps {', '.join(steps)}" if steps else "wait for the first save",
    )


def _generation(tokenizer: Tokenizer, stops: Sequence[int] = ()) -> dict[str, Any]:
    """What ends a text, for generation_config.json: the tokens that end a task's answers, else the end of text."""
    if stops:
        return {"eos_token_id": list(stops) if len(stops) > 1 else stops[0]}
    return {"eos_token_id": tokenizer.eos_id} if tokenizer.eos_id is not None else {}
