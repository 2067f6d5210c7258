"""From a path to a generator: a run folder, finished or not, or any Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainwright.base.device import chosen_device
from trainwright.base.errors import CheckpointError, ModelError
from trainwright.checkpoint import latest
from trainwright.data import load_tokenizer
from trainwright.inference.checkpoints import load_checkpointed_model
from trainwright.inference.generate import Generator
from trainwright.inference.options import GenerationOptions, options_from_hf
from trainwright.inference.writers import Writer, as_writer
from trainwright.models import load_pretrained
from trainwright.models.importing import read_json

__all__ = ["load_generator"]


def load_generator(
    path: str | Path, *, device: torch.device | str = "auto", dtype: torch.dtype | None = None
) -> Generator:
    """The model and tokenizer at `path`, ready to write.

    path: a Hugging Face folder; or a run folder, of which the exported `model/` is taken, else the newest checkpoint
        that can be believed (averaged weights where the run keeps them).
    device: a name is read by `chosen_device`. dtype: None keeps that of the stored weights, but widens float16
        to float32 on a CPU, which computes it slowly.

    Raises:
        ModelError: there is no model at `path`, or it cannot be used. CheckpointError: every checkpoint is damaged.
        DataError: the tokenizer is missing or malformed.
    """
    path = Path(path)
    target = chosen_device(device) if isinstance(device, str) else device
    if (path / "config.json").is_file():
        return _from_folder(path, target, dtype)
    if (path / "model" / "config.json").is_file():
        return _from_folder(path / "model", target, dtype)
    if (path / "checkpoints").is_dir():
        return _from_checkpoint(path, target, dtype)
    what = "is not a folder" if not path.is_dir() else "holds neither config.json, nor model/, nor checkpoints/"
    raise ModelError(f"no model at {path}: it {what}", hint="give a run folder or a Hugging Face model folder")


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Generator:
    model = load_pretrained(folder, dtype=dtype, device="cpu")
    defaults = GenerationOptions()
    if (folder / "generation_config.json").is_file():
        defaults = options_from_hf(read_json(folder / "generation_config.json"))
    return Generator(_place(model, device), load_tokenizer(str(folder)), defaults=defaults)


def _from_checkpoint(run: Path, device: torch.device, dtype: torch.dtype | None) -> Generator:
    newest = latest(run / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet and no exported model", hint="wait for the first save")
    model = load_checkpointed_model(newest, dtype=dtype)
    return Generator(_place(model, device), load_tokenizer(str(run / "tokenizer")))


def _place(loaded: Any, device: torch.device) -> Writer:
    model = as_writer(loaded)
    if device.type == "cpu" and model.embedding.weight.dtype == torch.float16:
        model = model.float()
    return model.to(device)
