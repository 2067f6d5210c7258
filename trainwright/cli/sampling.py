"""The options of `generate` and `chat` that decide how a model writes, and where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainwright.inference import GenerationOptions, Generator

__all__ = [
    "Device",
    "MaxNewTokens",
    "MinP",
    "Model",
    "RepetitionPenalty",
    "Root",
    "Seed",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "chosen_options",
    "open_generator",
]

Model = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's name or folder, or a Hugging Face folder.")]
Root = Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest continuation in tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Choose among the k likeliest tokens; 0 is off.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Choose among the likeliest that reach p together.")]
MinP = Annotated[float | None, typer.Option(min=0, max=1, help="Leave out tokens below p times the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0, help="Above 1: tokens seen before are less likely.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def open_generator(model: str, root: Path, device: str) -> Generator:
    """The model that `model` names: a folder, or a run's name in `root`."""
    from trainwright.inference import load_generator

    path = Path(model)
    if not path.exists() and (root / model).is_dir():
        path = root / model
    return load_generator(path, device=device)


def chosen_options(generator: Generator, **given: Any) -> GenerationOptions:
    """The model's own defaults with what was given on the command line over them."""
    return generator.defaults.replace(**{key: value for key, value in given.items() if value is not None})
