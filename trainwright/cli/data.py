"""`trainwright data build | preview | inspect | convert`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.convert import convert

if TYPE_CHECKING:
    from trainwright.config import LoadedRecipe

__all__ = ["app"]

app = typer.Typer(
    help="Build, preview and inspect datasets, and convert between formats of records.", no_args_is_help=True
)
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a run folder, or a built-in name such as stdlib.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values over the recipe's: data.packing=pad.")
]


@app.command()
def build(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to build in; the recipe's data.cache by default.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenize; data.workers by default.")
    ] = None,
) -> None:
    """Tokenize and pack the texts or records of a recipe; what is built already is reused."""
    from trainwright.data.examples.checks import check_folder

    lines = _build(_load(recipe, overrides), out, workers)
    print("\n".join(lines))
    check_folder(lines[0])


@app.command()
def preview(
    target: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, or the folder of a built dataset.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show, in the order in which training draws them.")] = 3,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of rows (train.seed).")] = 0,
) -> None:
    """Decoded rows with the trained tokens marked, and the shares of padding, cut and dropped documents."""
    from trainwright.data.commands import preview as lines

    folder = Path(target)
    names: tuple[str, ...] = ()
    if overrides or not (folder / "manifest.json").is_file():
        loaded = _load(target, overrides)
        folder = Path(_build(loaded, None, None)[0])
        names = _label_names(loaded, folder)
    width = max(40, shutil.get_terminal_size().columns - 2)
    color = sys.stdout.isatty()
    print("\n".join(lines(folder, rows=rows, split=split, seed=seed, color=color, width=width, names=names)))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a built dataset.")],
    verify: Annotated[bool, typer.Option(help="Read every byte and compare it with its hash.")] = True,
) -> None:
    """What a built dataset holds, and whether it is whole."""
    from trainwright.data.commands import inspect as lines

    print("\n".join(lines(folder, verify=verify)))


app.command()(convert)


def _load(recipe: str, overrides: list[str] | None) -> LoadedRecipe:
    from trainwright.config import load_recipe

    return load_recipe(recipe, overrides or ())


def _label_names(loaded: LoadedRecipe, folder: Path) -> tuple[str, ...]:
    """Names of the classes that labels stand for; () where they stand for something else."""
    from trainwright.data.examples.dataset import ExampleDataset
    from trainwright.trainer.task import define_task

    definition = define_task(loaded.recipe.task, loaded.recipe.data.sequence_length)
    if definition is None:
        return ()
    dataset = ExampleDataset.open(folder)
    head = definition.bind(dataset.survey, dataset.tokenizer()).head
    classes = head is not None and head.kind in ("sequence", "token", "entities") and head.problem != "regression"
    return head.labels if head is not None and classes else ()


def _build(loaded: LoadedRecipe, out: Path | None, workers: int | None) -> list[str]:
    """Build, and return what `data.commands.build` says: first the folder, then its description."""
    from trainwright.data.commands import build
    from trainwright.trainer.model_section import model_source
    from trainwright.trainer.task import define_task

    recipe = loaded.recipe
    definition = define_task(recipe.task, recipe.data.sequence_length)
    tokenizer = model_source(recipe.model).tokenizer if recipe.data.tokenizer == "auto" else None
    return build(loaded, out=out, workers=workers, model_tokenizer=tokenizer, definition=definition)
