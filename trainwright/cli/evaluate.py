"""`trainwright eval RUN|MODEL` and `trainwright predict RUN|MODEL DATA`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.base.errors import ConfigError, DataError
from trainwright.cli.columns import ColumnOption, columns_of, told_by_options
from trainwright.cli.run_folder import find_run

if TYPE_CHECKING:
    from trainwright.trainer.evaluation import Evaluation
    from trainwright.trainer.trained import Trained

__all__ = ["evaluate", "predict"]

Model = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A finished run's name or folder, or a model folder that it exported."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="Format of the data, or auto; by default it is read as the training data was."),
]
Rows = Annotated[int, typer.Option("--batch-rows", min=1, help="Rows of one forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Numbers = Annotated[
    str | None, typer.Option("--precision", help="fp32, bf16, ... of the forward pass; by default the run's own.")
]
_OPTIONS = {"columns": "--column", "format": "--format"}
"""What `data.*` of a recipe is called here."""
Root = Annotated[Path, typer.Option("--dir", help="Folder of all runs (run.dir of the recipe).")]


def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Data to judge on instead of the run's own.")] = None,
    format: Format = None,
    column: ColumnOption = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the run's own data: test (default), validation or train.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the metrics, the errors and the confusion matrix as a picture.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Records to write answers for, where the task writes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")] = False,
    batch_rows: Rows = 32,
    device: Device = "auto",
    precision: Numbers = None,
    root: Root = Path("runs"),
) -> None:
    """Judge a finished model: loss, the task's metrics and report."""
    columns = columns_of(column)
    if data is not None and split is not None:
        raise ConfigError(
            f"--split {split} names a part of the run's own data, and --data {data} is judged as a whole",
            hint="leave out one of them",
        )
    if data is None and (format is not None or columns):
        raise ConfigError(
            f"{'--column' if columns else '--format'} says how a file is read, and none is given",
            hint="give --data FILE: the run's own data is read as its recipe says",
        )
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder", hint="name a folder: it is made where it is not")
    split = split or "test"
    folder = _folder(model, root)
    from trainwright.trainer.assess import assess
    from trainwright.trainer.report import write_metrics, write_report
    from trainwright.trainer.trained import open_trained

    trained = open_trained(folder, device=device, numbers=precision)
    with told_by_options(_OPTIONS), _advising_auto(trained, format):
        result = assess(trained, split=split, source=data, format=format, columns=columns, rows=batch_rows, limit=limit)
    numbers = {"loss": result.loss, **result.metrics}
    if result.report is None:
        numbers["perplexity"] = result.perplexity
    if out is not None and result.report is not None:
        write_report(out, Path(data).stem if data else split, result.report, loss=result.loss)
    elif out is not None:
        write_metrics(out, Path(data).stem if data else split, numbers)
    if as_json:
        print(json.dumps({"count": result.tokens, **numbers}, ensure_ascii=False))
        return
    print("\n".join(_lines(result, trained.section.counted)))
    if out is not None:
        print(f"written to {out}")


def _folder(model: str, root: Path) -> Path:
    """What is meant: a folder as it is, else a run by its name."""
    return Path(model) if Path(model).is_dir() else find_run(model, root)


@contextmanager
def _advising_auto(trained: Trained, format: str | None) -> Iterator[None]:
    """Errors of files that are read in the format that the recipe of the run names say that there are others."""
    try:
        yield
    except DataError as error:
        named = trained.reading.format
        if format is not None or named == "auto":
            raise
        other = f"the file was read as {named}, like the training data; where it is of another format, --format auto"
        raise DataError(error.message, hint="; ".join(filter(None, (error.hint, other)))) from error


def _lines(result: Evaluation, counted: str) -> list[str]:
    from trainwright.trainer.report import describe_report

    loss = f"loss {result.loss:.4f} over {result.tokens:,} {counted}"
    if result.report is None:
        return [f"{loss}, perplexity {result.perplexity:.2f}"]
    return [*describe_report(result.report), "", loss]


def predict(
    model: Model,
    data: Annotated[
        str, typer.Argument(metavar="DATA|-", help="Records to predict for, in any format of the task; - is stdin.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Format of DATA: lines (one text a line), auto, or a name; by default as the training data was read.",
        ),
    ] = None,
    column: ColumnOption = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Format of the file, as in `data convert`; JSON lines by default.")
    ] = None,
    batch_rows: Rows = 32,
    device: Device = "auto",
    precision: Numbers = None,
    root: Root = Path("runs"),
) -> None:
    """Write what a finished model predicts, in the task's own format."""
    columns = columns_of(column)
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already", hint="name a new file; nothing is overwritten")
    if to is not None and out is None:
        raise ConfigError("--to needs a file", hint="give --out FILE")
    folder = _folder(model, root)
    from trainwright.trainer.predicting import predict_file
    from trainwright.trainer.trained import open_trained

    trained = open_trained(folder, device=device, numbers=precision)
    with told_by_options(_OPTIONS), _advising_auto(trained, format):
        lines, refused = predict_file(
            trained, data, out=out, to=to, rows=batch_rows, stdin=sys.stdin, format=format, columns=columns
        )
    for line in lines:
        print(line)
    if refused:
        count = "1 record" if len(refused) == 1 else f"{len(refused):,} records"
        print(f"{count} could not be used; the first: {refused[0]}", file=sys.stderr)
