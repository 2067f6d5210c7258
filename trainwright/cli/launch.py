"""`trainwright launch -- COMMAND`: the ranks of one machine for a script with a loop of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainwright.base.errors import ConfigError

__all__ = ["launch", "python_command"]


def launch(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="A Python script, -m MODULE, or any program, with its arguments. Put -- before it.",
        ),
    ],
    processes: Annotated[str, typer.Option(help="Ranks to start; auto is one for each accelerator.")] = "auto",
    hang_after: Annotated[
        float, typer.Option(min=0, help="Seconds without a heartbeat that count as a hang; 0 does not watch.")
    ] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that ranks get to save after SIGTERM or Ctrl-C.")] = 60.0,
    logs: Annotated[Path | None, typer.Option(help="Folder for what every rank writes; kept.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port where ranks meet; a free one is found.")
    ] = None,
    bind_cores: Annotated[bool, typer.Option("--bind-cores", help="Keep each rank on its own cores.")] = False,
) -> None:
    """Start a command once for each rank, and end all of them when one fails, hangs or is stopped."""
    from trainwright.launch import LaunchOptions, launch, launched, resolve_processes

    if not (processes == "auto" or (processes.isascii() and processes.isdecimal() and int(processes) > 0)):
        raise ConfigError(f"--processes {processes!r}, expected a number from 1 on, or auto")
    if launched():
        raise ConfigError(
            "this process was launched already (RANK or the variables of MPI are set)",
            hint="start the script itself, or unset these variables",
        )
    options = LaunchOptions(
        python_command(command),
        resolve_processes(processes),
        hang_after=hang_after or None,
        grace=grace,
        logs=logs,
        keep_logs=logs is not None,
        port=port,
        bind_cores=bind_cores,
    )
    raise typer.Exit(launch(options))


def python_command(command: list[str]) -> list[str]:
    """`script.py ...` and `-m module ...` run in this Python; everything else is a program."""
    if command[0] == "-m" or command[0].endswith(".py"):
        return [sys.executable, *command]
    return list(command)
