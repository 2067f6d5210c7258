"""`trainwright train RECIPE [key=value ...]`"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.base.errors import ConfigError

if TYPE_CHECKING:
    from trainwright.config import LoadedRecipe

__all__ = ["train"]


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, a run folder, or a built-in name such as stdlib.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values over the recipe's: optim.lr=3e-4.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="never: a new run; auto: go on with the newest run of this name; or a run folder.")
    ] = "never",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its predictions, then stop.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every resolved value and where it came from, then stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings only (monitor.console=quiet).")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no live display.")] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|A,B,C", help="Train with N seeds, or with these; mean and deviation.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="k-fold cross-validation: train k runs, each validated on its own fold.")
    ] = None,
) -> None:
    """Train what a recipe describes."""
    if quiet and plain:
        raise ConfigError("--quiet and --plain exclude each other", hint="give one of them")
    from trainwright.config import load_recipe

    console = ["monitor.console=quiet"] if quiet else ["monitor.console=plain"] if plain else []
    loaded = load_recipe(recipe, [*(overrides or ()), *console])
    from trainwright.launch import launched, resolve_processes

    processes = None if launched() else resolve_processes(loaded.recipe.launch.processes)
    if dry_run or print_config:
        _show(loaded, plan=dry_run, values=print_config, processes=processes)
        return
    if seeds is not None or folds is not None:
        if resume not in ("never", "auto"):
            raise ConfigError("--resume names one run, and --seeds and --folds make several", hint="leave --resume out")
        if processes is None:
            raise ConfigError(
                "--seeds and --folds start their runs themselves, and these ranks run already",
                hint="give launch.processes instead of starting the ranks with another launcher",
            )
        raise typer.Exit(_repeat(recipe, [*(overrides or ()), *console], seeds, folds, processes))
    if processes is not None and processes > 1:
        given = [recipe, *(overrides or ()), *console, "--resume", resume]
        raise typer.Exit(_launch(loaded, given, processes))
    from trainwright.trainer import Trainer

    Trainer(loaded, resume=resume).fit()


def _repeat(recipe: str, overrides: list[str], seeds: str | None, folds: int | None, processes: int) -> int:
    """Train several runs and print what they came to; 1 when one of them failed."""
    from trainwright.base.errors import Interrupted, TrainwrightError
    from trainwright.cli.failures import EXIT_INTERRUPTED
    from trainwright.trainer import repeat

    def in_processes(loaded: LoadedRecipe, own: Sequence[str]) -> None:
        code = _launch(loaded, [recipe, *overrides, *own, "--resume", "auto"], processes)
        if code in (EXIT_INTERRUPTED, Interrupted.exit_code, 128 + signal.SIGTERM):
            raise Interrupted("stopped", hint="give the same command again to go on")
        if code:
            raise TrainwrightError(f"its processes ended with exit code {code}")

    result = repeat(
        recipe,
        seeds=_seeds(seeds),
        folds=folds,
        overrides=overrides,
        train=in_processes if processes > 1 else None,
    )
    print("\n".join(result.table()))
    return 1 if result.failed else 0


def _seeds(given: str | None) -> int | list[int] | None:
    """`3` is how many, `0,7` which."""
    try:
        if given is None:
            return None
        return [int(part) for part in given.split(",") if part.strip()] if "," in given else int(given)
    except ValueError:
        raise ConfigError(f"--seeds {given}", hint="a number of seeds (3), or seeds with commas (0,7,11)") from None


def _launch(loaded: LoadedRecipe, given: list[str], processes: int) -> int:
    """Start this same command once for each rank; gives the exit code."""
    from trainwright.launch import LaunchOptions, launch

    debug = ["--debug"] if "--debug" in sys.argv else []
    command = [sys.executable, "-m", "trainwright", *debug, "train", *given]
    return launch(
        LaunchOptions(
            command,
            processes,
            hang_after=float(loaded.recipe.comm.hang_after.value),
            logs=Path(loaded.recipe.run.dir) / ".launch",
        )
    )


def _show(loaded: object, *, plan: bool, values: bool, processes: int | None) -> None:
    from trainwright.config import LoadedRecipe
    from trainwright.trainer import settle

    assert isinstance(loaded, LoadedRecipe)
    settled = settle(loaded, build_data=False, processes=processes)
    if values:
        print(settled.loaded.explain())
    if plan:
        print(settled.plan.describe())
