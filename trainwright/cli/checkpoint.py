"""`trainwright checkpoint list | verify | import-deepspeed`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trainwright.base.errors import CheckpointError
from trainwright.base.text import align_columns, human_bytes, human_duration
from trainwright.cli.run_folder import find_run

__all__ = ["app"]

app = typer.Typer(help="List and verify the checkpoints of a run; import those of DeepSpeed.", no_args_is_help=True)
Root = Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")]


@app.command("list")
def list_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")], root: Root = Path("runs")
) -> None:
    """The checkpoints of a run, damaged ones included."""
    from trainwright.checkpoint import list_checkpoints

    folder = find_run(run, root)
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        print(f"{folder} has no checkpoints")
        return
    rows = [("step", "size", "saved", "state")]
    for info in found:
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.time)) if info.complete else "-"
        size = human_bytes(info.bytes) if info.complete else "-"
        rows.append((str(info.step), size, saved, "complete" if info.complete else f"refused: {info.problem}"))
    print("\n".join(align_columns(rows, right=(0, 1))))


@app.command()
def verify(
    target: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run (all its checkpoints) or a step-N folder.")
    ],
    root: Root = Path("runs"),
) -> None:
    """Read every byte and compare it with its hash. Exits with 5 when anything differs."""
    from trainwright.checkpoint import list_checkpoints, verify

    path = Path(target)
    if path.is_dir() and not (path / "run.json").is_file() and path.name.startswith("step-"):
        folders = [path]
    else:
        folder = find_run(target, root)
        folders = [info.path for info in list_checkpoints(folder / "checkpoints")]
        if not folders:
            raise CheckpointError(f"{folder} has no checkpoints to verify")
    damaged = []
    for folder in folders:
        report = verify(folder)
        if report.ok:
            print(f"{folder}: good, {human_bytes(report.bytes)} read in {human_duration(report.seconds)}")
            continue
        damaged.append(folder.name)
        print(f"{folder}: damaged")
        print("\n".join(f"  {problem}" for problem in report.problems))
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(folders)} checkpoints are damaged: {', '.join(damaged)}",
            hint="a resume passes them over and takes the newest good one",
        )


@app.command("import-deepspeed")
def import_deepspeed_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What DeepSpeed's save_checkpoint was given.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that does not exist or is empty.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="I know who made these files: pickles, without hashes.")
    ] = False,
    tag: Annotated[str | None, typer.Option(help="Which checkpoint (global_step100); else the latest.")] = None,
) -> None:
    """Write fp32 weights as safetensors under their own names, and the optimizer's moments beside them."""
    from trainwright.checkpoint.deepspeed import import_deepspeed

    done = import_deepspeed(folder, destination, tag=tag, trust=allow_pickle)
    print(f"imported to {done.path}: {done.parameters:,} values in fp32, ZeRO stage {done.stage}, {done.ranks} ranks")
    print(f"moments: {', '.join(done.moments) if done.moments else 'none'}")
    for note in done.notes:
        print(f"note: {note}")
