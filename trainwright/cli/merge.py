"""`trainwright merge RUN|FOLDER DEST`"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from trainwright.base.errors import ConfigError
from trainwright.cli.run_folder import find_run

__all__ = ["merge"]

_TYPES = ("fp32", "bf16", "fp16")


def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN|FOLDER", help="A run with adapters, or a folder of adapters (ours or peft's).")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that does not exist or is empty.")],
    base: Annotated[Path | None, typer.Option(help="The model they belong to; else what the adapters say.")] = None,
    into: Annotated[
        str,
        typer.Option(help="trained: the weights they were trained on, 4 bits opened; original: those of the base."),
    ] = "trained",
    text: Annotated[
        Path | None, typer.Option(help="Text on which the change is measured, a line each; else random tokens.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; else that of the base.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest change of a logit; else what rounding explains.")
    ] = None,
    root: Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")] = Path("runs"),
) -> None:
    """Merge adapters into their base: a plain Hugging Face folder, and the change that it makes, measured."""
    if into not in ("trained", "original"):
        raise ConfigError(f"--into {into} is not one of trained, original")
    if dtype is not None and dtype not in _TYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(_TYPES)}")
    folder = _adapters(source, root)
    import torch

    from trainwright.inference.adapter_merging import merge_folder, text_rows
    from trainwright.trainer.task import TASK_FILE

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    report = merge_folder(
        folder,
        destination,
        base=base,
        into="original" if into == "original" else "trained",
        rows=None if text is None else text_rows(text, folder, base),
        dtype=None if dtype is None else types[dtype],
        tolerance=tolerance,
    )
    if (folder.parent / "run.json").is_file() and (folder.parent / TASK_FILE).is_file():
        shutil.copy2(folder.parent / TASK_FILE, destination / TASK_FILE)  # what `eval` and `predict` need to know
    print(report)
    print(f"merged into {destination}")


def _adapters(source: str, root: Path) -> Path:
    """The folder of adapters that is meant."""
    for folder in (Path(source), Path(source) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    run = find_run(source, root)
    folder = run / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{run} has no adapters (no {folder / 'adapter_config.json'})",
            hint="a run writes them at its end when its recipe has `adapter`; `trainwright export` writes whole models",
        )
    return folder
