"""Export: trained weights and tokenizer as a Hugging Face folder that stands on its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.checkpoint import latest, load_checkpoint
from trainwright.data import Tokenizer, load_tokenizer
from trainwright.models import Decoder, build_model, save_pretrained
from trainwright.models.fields import config_from_fields
from trainwright.trainer.run import Run
from trainwright.trainer.run_folder import RunFolder

__all__ = ["export_model", "export_run", "load_checkpointed_model"]


def export_model(run: Run) -> Path:
    """Write `model/` of a run that has ended: averaged weights where there are any, else the last ones."""
    with run.engine.averaged():
        _write(run.engine.model, run.tokenizer, run.folder.model)
    return run.folder.model


def export_run(run_folder: str | Path, destination: str | Path, *, step: int | None = None) -> Path:
    """Export a run to `destination`, which must not exist or be empty.

    Args:
        step: the checkpoint to take; None takes the finished model, or the newest good checkpoint of an unfinished run.

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
    if step is None and (folder.model / "config.json").exists():
        return Path(shutil.copytree(folder.model, destination, dirs_exist_ok=True))
    _write(load_checkpointed_model(folder, step), load_tokenizer(folder.tokenizer), destination)
    return destination


def load_checkpointed_model(folder: RunFolder, step: int | None) -> Decoder:
    """The model of a checkpoint on CPU, with averaged weights where the run keeps them; None is the newest good one."""
    path = folder.checkpoints / f"step-{step}" if step is not None else latest(folder.checkpoints)
    if path is None or not path.exists():
        held = sorted(
            int(p.name.removeprefix("step-")) for p in folder.checkpoints.glob("step-*") if p.name[5:].isdigit()
        )
        seen = f"checkpoints: {', '.join(map(str, held))}" if held else "it has no checkpoints"
        raise CheckpointError(
            f"{folder.path} has no checkpoint of step {step}" if step else f"{folder.path}: {seen}", hint=seen
        )
    state, meta = load_checkpoint(path)
    weights = state["engine"]["model"]
    model = build_model(config_from_fields(meta["model"]), dtype=next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    if "ema" in state["engine"]:
        averages = state["engine"]["ema"]["averages"]
        for name, parameter in model.named_parameters():
            parameter.data.copy_(averages[name])
    return model.eval()


def _write(model: Decoder, tokenizer: Tokenizer, destination: Path) -> None:
    # The tokenizer first: a folder with config.json and weights is complete.
    destination.mkdir(parents=True, exist_ok=True)
    tokenizer.save(destination)
    save_pretrained(
        model, destination, generation={"eos_token_id": tokenizer.eos_id} if tokenizer.eos_id is not None else None
    )
