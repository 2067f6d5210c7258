"""`trainwright` and `tw`: the verbs put together, and every failure turned into one clear message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from trainwright.cli import (
    chat,
    checkpoint,
    data,
    doctor,
    evaluate,
    export,
    generate,
    launch,
    memory,
    merge,
    runs,
    train,
    version,
)
from trainwright.cli.failures import EXIT_INTERRUPTED, report

__all__ = ["app", "main", "run"]

# typer brings its own copy of click in newer versions: its exceptions are found through what typer exports.
_UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    name="trainwright",
    help="Train a language model, use it, and look after its runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: trainwright train stdlib. Exit codes and every verb: docs/cli.md",
)

for _verb in (
    train.train,
    launch.launch,
    memory.memory,
    generate.generate,
    chat.chat,
    evaluate.predict,
    export.export,
    merge.merge,
    doctor.doctor,
    version.version,
):
    app.command()(_verb)
app.command("eval")(evaluate.evaluate)
for _name, _group in (("data", data.app), ("runs", runs.app), ("checkpoint", checkpoint.app)):
    app.add_typer(_group, name=_name)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere in the command.")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; messages of failures go to standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    given = [argument for i, argument in enumerate(given) if i >= end or argument != "--debug"]
    try:
        code = app(args=given, prog_name="trainwright", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return EXIT_INTERRUPTED
    except _UsageError as error:
        error.show()
        return error.exit_code
    except BaseException as error:  # the outermost frame: whatever it is, the user gets one message and a code
        return report(error, debug=debug)


def run() -> NoReturn:
    """Entry point of the installed commands."""
    sys.exit(main())
