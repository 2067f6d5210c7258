"""`trainwright export RUN DEST`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.run_folder import find_run

__all__ = ["export"]


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that does not exist or is empty.")],
    step: Annotated[int | None, typer.Option(min=0, help="Export this checkpoint; else the finished model.")] = None,
    root: Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")] = Path("runs"),
) -> None:
    """Write a Hugging Face folder: safetensors, config, tokenizer."""
    folder = find_run(run, root)
    from trainwright.trainer import export_run

    path = export_run(folder, destination, step=step)
    print(f"exported to {path}")
    print(f"open it with transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})")
