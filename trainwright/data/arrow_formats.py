"""Readers of columnar formats: Parquet, Arrow IPC (file and stream), folders saved by `datasets`, and hub data sets.

Only the needed column is read, batch by batch, so memory stays at one batch whatever the size of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainwright.base.errors import DataError, MissingDependencyError
from trainwright.data.compression import DamagedFileError, open_binary, open_seekable
from trainwright.data.documents import Policy, Row, Shard, fields_seen

__all__ = ["ARROW_FORMATS", "HF_PREFIX", "hub_shard", "is_saved_dataset", "read_arrow", "read_hub", "read_parquet"]

ARROW_FORMATS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
HF_PREFIX = "hf://"
_BATCH_ROWS = 1024
_HUB_NAME = re.compile(
    r"hf://(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.+%\[\]:-]+))?"
)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading Parquet and Arrow files needs the package pyarrow", hint="pip install 'trainwright[arrow]'"
        ) from error
    return pyarrow


def _choose_columns(names: list[str], text_field: str | None, url: str, *, rendered: bool) -> list[str]:
    """The columns to read: the text alone, or all where a row is rendered or the field is nested."""
    if text_field is None:
        return names
    if text_field in names:
        return [text_field]
    if rendered:
        return names
    head = text_field.split(".", 1)[0]
    if head != text_field and head in names:
        return [head]
    raise DataError(
        f"{url}: no column {text_field!r}; {fields_seen(text_field, names)}",
        hint="set text_field to one of them",
    )


def _rows(batch: Any, first: int, shard: Shard, policy: Policy) -> Iterator[Row]:
    """The rows of one record batch; a value that is not UTF-8 costs only its row."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = None
    for index in range(batch.num_rows):
        number = first + index + 1
        where = f"{shard.url} row {number}"
        if values is None:
            try:
                fields = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                policy.report("invalid-utf8", f"{where}: invalid UTF-8 at byte {error.start} of a value")
                continue
        else:
            fields = values[index]
        yield Row(fields, where, f"{shard.key}:{number}")


def read_parquet(shard: Shard, policy: Policy, text_field: str | None, *, rendered: bool = False) -> Iterator[Row]:
    """The rows of a Parquet file, row group by row group."""
    arrow = _pyarrow()
    with open_seekable(shard.url, shard.compression) as stream:
        try:
            file = arrow.parquet.ParquetFile(stream)
            columns = _choose_columns(file.schema_arrow.names, text_field, shard.url, rendered=rendered)
            first = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield from _rows(batch, first, shard, policy)
                first += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            raise DamagedFileError(f"{shard.url}: not a readable Parquet file: {error}") from error


def read_arrow(shard: Shard, policy: Policy, text_field: str | None, *, rendered: bool = False) -> Iterator[Row]:
    """The rows of an Arrow IPC file (also Feather 2) or stream (what `datasets` writes), told apart by their magic."""
    arrow = _pyarrow()
    with open_binary(shard.url, shard.compression) as stream:
        is_file = stream.read(6) == b"ARROW1"
    opener = open_seekable if is_file else open_binary
    with opener(shard.url, shard.compression) as stream:
        try:
            reader = arrow.ipc.open_file(stream) if is_file else arrow.ipc.open_stream(stream)
            columns = _choose_columns(reader.schema.names, text_field, shard.url, rendered=rendered)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            first = 0
            for batch in batches:
                chosen = batch.select(columns)
                for start in range(0, chosen.num_rows, _BATCH_ROWS):
                    yield from _rows(chosen.slice(start, _BATCH_ROWS), first + start, shard, policy)
                first += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            raise DamagedFileError(f"{shard.url}: not a readable Arrow file: {error}") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a `save_to_disk` folder, in row order; of its `train` split where it holds several."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
        if "train" not in splits and len(splits) != 1:
            raise DataError(
                f"{folder}: a saved data set with the splits {', '.join(splits)} and no 'train'",
                hint=f"name one: {folder / splits[0]}",
            )
        folder = folder / ("train" if "train" in splits else splits[0])
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{folder}: its state.json cannot be read ({error!r})", hint="save it again") from error
    return files


def hub_shard(source: str) -> Shard:
    """The one shard of `hf://owner/name[@revision][/config][:split]`. Nothing is downloaded yet."""
    if _HUB_NAME.fullmatch(source) is None:
        raise DataError(f"{source!r} is not a data set name", hint="write hf://owner/name[@revision][/config][:split]")
    return Shard(source, "hub", None, None, source.removeprefix(HF_PREFIX))


def read_hub(shard: Shard, policy: Policy, text_field: str | None, *, rendered: bool = False) -> Iterator[Row]:
    """The rows of a Hugging Face data set, downloaded once into its cache. Data files only: no code of it is run."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{shard.url}: hub data sets need the package datasets", hint="pip install 'trainwright[hub]'"
        ) from error
    match = _HUB_NAME.fullmatch(shard.url)
    assert match is not None, shard.url  # hub_shard checked it
    parts = match.groupdict()
    try:
        table = datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train", revision=parts["revision"]
        )
    except Exception as error:  # the library raises whatever its layers raise: network, cache, names, formats
        cause = " ".join(str(error).split())
        raise DataError(
            f"{shard.url}: cannot load the data set: {type(error).__name__}: {cause}",
            hint="check the name, config and split, the network, HF_TOKEN for gated sets and HF_HUB_OFFLINE; "
            "a folder from save_to_disk or Parquet files work without the network",
        ) from error
    columns = _choose_columns(table.column_names, text_field, shard.url, rendered=rendered)
    table = table.select_columns(columns).with_format("arrow")
    first = 0
    for batch in table.iter(_BATCH_ROWS):
        for chunk in batch.to_batches():
            yield from _rows(chunk, first, shard, policy)
            first += chunk.num_rows
