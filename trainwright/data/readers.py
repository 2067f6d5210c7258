"""The front door of reading: sources in, documents out. Formats, compression and file systems lie behind it.

problems = Problems()
for shard in list_shards(SourceSpec("corpus/**/*.jsonl.zst", text_field="content")):
    for document in read_shard(shard, text_field="content", on_error="skip", problems=problems):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.arrow_formats import read_arrow, read_hub, read_parquet
from trainwright.data.compression import DamagedFileError
from trainwright.data.delimited import read_delimited
from trainwright.data.documents import (
    Document,
    OnError,
    Policy,
    Problems,
    Row,
    Shard,
    SourceSpec,
    fields_seen,
    split_of,
)
from trainwright.data.formats import read_json, read_jsonl, read_text
from trainwright.data.sources import list_shards

__all__ = [
    "DamagedFileError",
    "Document",
    "Problems",
    "Row",
    "Shard",
    "SourceSpec",
    "list_shards",
    "read_rows",
    "read_shard",
    "split_of",
]

Render = Callable[[Mapping[str, Any]], str | None]
"""Turns a row without the text field into text (a chat, an instruction); None when it cannot."""


def read_shard(
    shard: Shard,
    *,
    text_field: str = "text",
    on_error: OnError = "stop",
    problems: Problems | None = None,
    render: Render | None = None,
) -> Iterator[Document]:
    """The documents of one shard, in file order, streamed where the format allows.

    A row that has `text_field` gives that text; a row without it is given to `render`, when there is one. Dots in
    `text_field` reach into nested objects. Empty texts are counted in `problems` and left out, under any policy.

    Raises DataError at the first problem under "stop". Under "skip" the bad record, or the unreadable rest of a damaged
    file, is left out and counted in `problems`; a missing file or a wrong field name of a whole table still raises.
    """
    policy = _policy(on_error, problems)
    empty = True
    for row in _guarded(shard, policy, text_field, rendered=render is not None):
        empty = False
        text = _text_of(row, text_field, policy, render)
        if text:
            yield Document(text, row.where, row.key)
        elif text is not None:
            policy.note_empty(row.where)
    if empty and not policy.problems.total:
        policy.note_empty(shard.url)


def read_rows(shard: Shard, *, on_error: OnError = "stop", problems: Problems | None = None) -> Iterator[Row]:
    """The records of one shard with all their fields, for tasks that need more than a text. A text file is one str."""
    yield from _guarded(shard, _policy(on_error, problems), None, rendered=True)


def _policy(on_error: OnError, problems: Problems | None) -> Policy:
    if on_error not in ("stop", "skip"):
        raise ConfigError(f"on_error is {on_error!r}; expected 'stop' or 'skip'")
    return Policy(on_error, problems if problems is not None else Problems())


def _guarded(shard: Shard, policy: Policy, text_field: str | None, *, rendered: bool) -> Iterator[Row]:
    """The rows of a shard; damage ends the shard under "skip" and the run under "stop"."""
    try:
        yield from _rows_of(shard, policy, text_field, rendered=rendered)
    except DamagedFileError as error:
        if policy.on_error == "stop":
            raise
        policy.problems.add("damaged-file", error.message)


def _rows_of(shard: Shard, policy: Policy, text_field: str | None, *, rendered: bool) -> Iterator[Row]:
    match shard.format:
        case "text":
            return read_text(shard, policy)
        case "jsonl":
            return read_jsonl(shard, policy)
        case "json":
            return read_json(shard, policy)
        case "csv" | "tsv":
            return read_delimited(shard, policy, None if rendered else text_field)
        case "parquet":
            return read_parquet(shard, policy, text_field, rendered=rendered)
        case "arrow":
            return read_arrow(shard, policy, text_field, rendered=rendered)
        case "hub":
            return read_hub(shard, policy, text_field, rendered=rendered)
    raise DataError(f"{shard.url}: unknown format {shard.format!r}")


def _text_of(row: Row, text_field: str, policy: Policy, render: Render | None) -> str | None:
    """The text of a row; None when there is none and the policy says to go on."""
    fields = row.fields
    if isinstance(fields, str):
        return _storable(fields, row, policy)
    found, value = _lookup(fields, text_field)
    if not found:
        value = render(fields) if render is not None else None
        if value is None:
            _report_missing(row, text_field, fields, policy)
            return None
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        policy.report("not-a-string", f"{row.where}: field {text_field!r} is {kind} ({value!r:.60}); expected a string")
        return None
    return _storable(value, row, policy)


def _lookup(fields: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    if name in fields:
        return True, fields[name]
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _storable(text: str, row: Row, policy: Policy) -> str | None:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8 form."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            message = f"{row.where}: a lone surrogate {code} at character {error.start}, which is not text"
            policy.report("invalid-unicode", message)
            return None
    return text


def _report_missing(row: Row, text_field: str, fields: Mapping[str, Any], policy: Policy) -> None:
    names = [str(name) for name in fields]
    message = f"{row.where}: no field {text_field!r}; {fields_seen(text_field, names)}"
    hint = "set text_field to one of them, or data.on_error: skip"
    if {"messages", "conversations", "instruction"} & set(names):
        hint = "these look like chats or instructions: render them with a chat template, or set text_field"
    policy.report("missing-field", message, hint=hint)
