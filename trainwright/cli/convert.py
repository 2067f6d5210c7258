"""`trainwright data convert SRC DST`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.columns import ColumnOption, columns_of, told_by_options

if TYPE_CHECKING:
    from trainwright.data.documents import Problems

__all__ = ["convert"]

_OPTIONS = {
    "columns": "--column",
    "format": "--from",
    "encoding": "--encoding",
    "separator": "--separator",
    "names": "--names",
    "scheme": "--scheme",
    "on_error": "--on-error",
}
"""What `data.*` of a recipe is called here."""


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, glob, folder, URL or hub name; train.{de,en}.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The new file, which must not exist.")],
    task: Annotated[str, typer.Option(help="The task whose records these are: ner, classification, sft, qa, ...")],
    to: Annotated[str, typer.Option(help="Format to write: conll, sharegpt, squad, ..., or jsonl, json, csv, tsv.")],
    from_: Annotated[str, typer.Option("--from", help="Format to read; auto finds it by the columns.")] = "auto",
    column: ColumnOption = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    separator: Annotated[str | None, typer.Option(help="What stands between several labels.")] = None,
    names: Annotated[
        str | None, typer.Option(help="Names of labels or tags that are numbers, in order, with commas.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Scheme of the tags to read; auto finds it.")] = "auto",
    to_scheme: Annotated[
        str, typer.Option(help="Scheme of the tags to write: iob2, iob1, bioes, bmes, bilou.")
    ] = "iob2",
    on_error: Annotated[
        str, typer.Option(help="stop at the first record that cannot be used, or skip and count.")
    ] = "stop",
) -> None:
    """Write records in another format of their task: conll, jsonl, sharegpt, squad, ..."""
    from trainwright.base.errors import ConfigError
    from trainwright.data.records.converting import convert as convert_records

    columns = columns_of(column)
    if on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error {on_error!r}: expected stop or skip")
    with told_by_options(_OPTIONS):
        done = convert_records(
            source,
            destination,
            to=to,
            task=task,
            from_=from_,
            columns=columns,
            encoding=encoding,
            separator=separator,
            names=[name.strip() for name in names.split(",")] if names else (),
            scheme=scheme,
            to_scheme=to_scheme,
            on_error="stop" if on_error == "stop" else "skip",
        )
    print(f"{done.written:,} records written to {destination}")
    for title, problems in (("while reading", done.read), ("not written", done.lost)):
        print("\n".join(_told(title, problems)), end="\n" if problems.total else "")


def _told(title: str, problems: Problems) -> Iterator[str]:
    if problems.total:
        yield f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(problems.counts.items()))
        yield from (f"  {line}" for line in problems.examples[:5])
