"""`trainwright export RUN DEST`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainwright.base.errors import ConfigError
from trainwright.base.units import Bytes
from trainwright.cli.run_folder import find_run

__all__ = ["export"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that does not exist or is empty.")],
    step: Annotated[int | None, typer.Option(min=0, help="Export this checkpoint; else the finished model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="bf16, fp16 or fp32: type of the weights; else as they are.")
    ] = None,
    max_shard: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file, such as 2GB; 5 GB by default.")
    ] = None,
    root: Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")] = Path("runs"),
) -> None:
    """Write a Hugging Face folder: safetensors, config, tokenizer."""
    folder = find_run(run, root)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}", hint=f"one of {', '.join(DTYPES)}")
    size = None if max_shard is None else int(Bytes.parse(max_shard))
    if size is not None and size < 1:
        raise ConfigError(f"--max-shard {max_shard}: no file is that small", hint="such as 2GB or 500 MB")
    import torch

    from trainwright.trainer import export_run

    kind = None if dtype is None else getattr(torch, DTYPES[dtype])
    path = export_run(folder, destination, step=step, dtype=kind, max_shard_bytes=size)
    print(f"exported to {path}")
    print(f"open it with transformers.{_class_of(path)}.from_pretrained({str(path)!r})")


def _class_of(folder: Path) -> str:
    """The class of transformers that opens the folder as what it is."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError):
        named = None
    return str(named[0]) if named else "AutoModel"
