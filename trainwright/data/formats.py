"""Readers of text formats: whole-file text, jsonl and json. Each turns the bytes of a shard into rows.

A reader yields rows and reports what is wrong with a single record to the policy; it raises only when the rest of the
file cannot be read. Positions are 1-based lines and 1-based columns, and 0-based byte offsets of the decompressed file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from trainwright.base.errors import DataError
from trainwright.data.compression import DamagedFileError, open_binary
from trainwright.data.documents import Policy, Row, Shard

__all__ = ["TEXT_FORMATS", "decoded_lines", "read_json", "read_jsonl", "read_text"]

_CODE = (
    "py pyi ipy js mjs cjs jsx ts tsx c cc cpp cxx h hh hpp hxx java go rs rb sh bash zsh html htm css scss kt kts "
    "scala swift php pl pm lua r jl sql cs fs m mm hs ml mli ex exs erl clj el lisp vue svelte tex rst cu cuh proto"
)
TEXT_FORMATS: dict[str, str] = {
    **dict.fromkeys((f".{name}" for name in _CODE.split()), "text"),
    **dict.fromkeys((".txt", ".text", ".md", ".markdown"), "text"),
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
}
"""File extension (lower case) to the name of the format that reads it."""

_LIST_NAMES = ("data", "rows", "examples", "train", "documents", "items")
_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"))
_UNICODE_BOMS = (*_BOMS, (codecs.BOM_UTF16_BE, "UTF-16"))
_COMPRESSED = ((b"\x1f\x8b", "gzip", ".gz"), (b"\x28\xb5\x2f\xfd", "zstd", ".zst"), (b"PK\x03\x04", "zip", None))


def _refuse_binary(head: bytes, url: str) -> None:
    """Raise for the well-known beginnings of files that are not UTF-8 text."""
    for mark, name in _UNICODE_BOMS:
        if head.startswith(mark):
            raise DamagedFileError(
                f"{url}: is {name} text; expected UTF-8", hint=f"convert it: iconv -f {name} -t UTF-8"
            )
    for mark, name, suffix in _COMPRESSED:
        if head.startswith(mark):
            advice = f"give the file name the ending {suffix}" if suffix else "unpack it first"
            raise DamagedFileError(f"{url}: is {name} data under another name; expected text", hint=advice)


def _refuse_nul(data: bytes, offset: int, where: str) -> None:
    position = data.find(0)
    if position >= 0:
        raise DamagedFileError(
            f"{where}: binary data (a NUL byte at byte {offset + position}); expected UTF-8 text",
            hint="leave the file out, or set data.on_error: skip",
        )


def _bad_text(where: str, data: bytes, offset: int, error: UnicodeDecodeError, encoding: str) -> str:
    found = data[error.start : error.start + 4].hex(" ")
    name = "UTF-8" if encoding == "utf-8" else encoding
    return f"{where}: invalid {name} at byte {offset + error.start} (bytes {found}): {error.reason}"


_UTF8_HINT = "convert the file to UTF-8 (iconv -f GB18030 -t UTF-8, for example), or set data.on_error: skip"


def read_text(shard: Shard, policy: Policy) -> Iterator[Row]:
    """A whole file as one document. A byte order mark is dropped; line endings stay as they are."""
    with open_binary(shard.url, shard.compression) as stream:
        data = stream.read()
    _refuse_binary(data[:4], shard.url)
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    _refuse_nul(data, 0, shard.url)
    try:
        text = data.decode(shard.encoding)[1 if mark else 0 :]
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = _bad_text(f"{shard.url}:{line}", data, 0, error, shard.encoding)
        policy.report("invalid-utf8", message, hint=_UTF8_HINT)
        return
    yield Row(text, shard.url, shard.key)


def decoded_lines(stream: IO[bytes], shard: Shard, policy: Policy) -> Iterator[tuple[int, str]]:
    """(line number, decoded line with its ending), without the lines that are not of the shard's encoding."""
    offset = 0
    for number, data in enumerate(stream, start=1):
        start = offset
        offset += len(data)
        if number == 1:
            _refuse_binary(data[:4], shard.url)
            data = data.removeprefix(codecs.BOM_UTF8)
            start = offset - len(data)
        if b"\0" in data:
            _refuse_nul(data, start, f"{shard.url}:{number}")
        try:
            yield number, data.decode(shard.encoding)
        except UnicodeDecodeError as error:
            message = _bad_text(f"{shard.url}:{number}", data, start, error, shard.encoding)
            policy.report("invalid-utf8", message, hint=_UTF8_HINT)


def _parse_json(text: str) -> Any:
    """The JSON value; every way in which Python's parser fails becomes ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _json_reason(error: ValueError, url: str, line: int) -> str:
    """`file:line:column: reason` for a value that begins on `line`."""
    if isinstance(error, json.JSONDecodeError):
        return f"{url}:{line + error.lineno - 1}:{error.colno}: not valid JSON: {error.msg}"
    return f"{url}:{line}: not valid JSON: {error}"


def read_jsonl(shard: Shard, policy: Policy) -> Iterator[Row]:
    """One JSON object per line; blank lines are passed over."""
    with open_binary(shard.url, shard.compression) as stream:
        yield from _jsonl_rows(decoded_lines(stream, shard, policy), shard, policy)


def _jsonl_rows(lines: Iterator[tuple[int, str]], shard: Shard, policy: Policy) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
        except ValueError as error:
            message = f"{_json_reason(error, shard.url, number)}; expected one JSON object per line"
            policy.report("not-json", message)
            continue
        if isinstance(value, dict):
            yield Row(value, f"{shard.url}:{number}", f"{shard.key}:{number}")
        else:
            message = f"{shard.url}:{number}: a JSON {_json_type(value)}; expected one JSON object per line"
            policy.report("not-an-object", message)


def read_json(shard: Shard, policy: Policy) -> Iterator[Row]:
    """A list of objects or strings, an object that holds such a list, or (a common misnomer) jsonl. Read as a whole."""
    with open_binary(shard.url, shard.compression) as stream:
        lines = list(decoded_lines(stream, shard, policy))
    text = "".join(line for _, line in lines)
    if not text.strip():
        return
    try:
        value = _parse_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and _first_line_is_object(lines):
            yield from _jsonl_rows(iter(lines), shard, policy)
            return
        raise DamagedFileError(
            f"{_json_reason(error, shard.url, 1)}; expected a JSON list of objects or strings",
            hint="mend the file; one object per line is read when the file is named .jsonl",
        ) from error
    for index, item in enumerate(_json_items(value, shard.url)):
        where = f"{shard.url} item {index + 1}"
        if isinstance(item, dict | str):
            yield Row(item, where, f"{shard.key}:{index + 1}")
        else:
            policy.report("not-an-object", f"{where}: a JSON {_json_type(item)}; expected an object or a string")


def _first_line_is_object(lines: list[tuple[int, str]]) -> bool:
    first = next((line for _, line in lines if line.strip()), "")
    try:
        return isinstance(_parse_json(first), dict)
    except ValueError:
        return False


def _json_items(value: Any, url: str) -> list[Any]:
    """The list of records in a parsed file."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DamagedFileError(f"{url}: a JSON {_json_type(value)}; expected a list of objects or strings")
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    chosen = next((name for name in _LIST_NAMES if name in lists), None)
    if chosen is None and len(lists) == 1:
        chosen = next(iter(lists))
    if chosen is not None and "messages" not in lists and "conversations" not in lists:
        return lists[chosen]
    if len(lists) > 1 and "messages" not in lists and "conversations" not in lists:
        raise DataError(
            f"{url}: a JSON object with several lists ({', '.join(sorted(lists))}); expected one list of records",
            hint=f"name the list of records {_LIST_NAMES[0]!r}, or store the list alone",
        )
    return [value]


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true/false", int: "number", float: "number"}
    return names.get(type(value), "null")
