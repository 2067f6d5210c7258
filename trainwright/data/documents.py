"""The values that readers speak: where text comes from, one document, and what was wrong with the rest.

A *source* is what a person names in a recipe; a *shard* is one file of it; a *document* is one text of a shard. Keys
are relative to the source's root, so that the same data gives the same keys on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainwright.base.errors import ConfigError, DataError

__all__ = ["Document", "OnError", "Problems", "Row", "Shard", "SourceSpec", "split_of"]

OnError = Literal["stop", "skip"]
EXAMPLES_KEPT = 10  # enough to see the pattern of what is wrong, few enough to print


@dataclass(frozen=True)
class SourceSpec:
    """One entry of a mixture: a path, glob, folder, fsspec URL, `hf://owner/name[/config][:split]` or `python-stdlib`.

    `weight` is the share in a mixture, relative to the other sources. `text_field` names the column or JSON key that
    holds the text, where the format has fields. `name` is what reports call the source; the source itself by default.
    """

    source: str
    weight: float = 1.0
    text_field: str = "text"
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConfigError("a data source is empty", hint="name a file, folder, glob, URL or python-stdlib")
        if not 0.0 < self.weight < float("inf"):
            raise ConfigError(f"source {self.source!r} has weight {self.weight}; a weight is a number above 0")

    @property
    def label(self) -> str:
        """The name that reports and manifests use."""
        return self.name or self.source


@dataclass(frozen=True)
class Shard:
    """One file of a source: the unit of parallel and resumable work. Holds only plain values, so it can be pickled.

    `format` is a name of `formats.FORMATS`, `compression` is "gz", "zst" or None, `size` is in bytes as stored (None
    when unknown before reading), `key` is the path relative to the source's root, `modified` is whatever the file
    system tells a changed file by (time or ETag), and `encoding` is how the characters of text formats are written.
    """

    url: str
    format: str
    compression: str | None
    size: int | None
    key: str
    modified: str | None = None
    encoding: str = "utf-8"


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `where` is for people (file:line); `key` is the same on every machine, and splits are drawn from it."""

    text: str
    where: str
    key: str


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a format with fields (jsonl, csv, parquet, ...), before a text is taken from it."""

    fields: Mapping[str, Any] | str
    where: str
    key: str


@dataclass
class Problems:
    """What was skipped: a count for each kind, and the first examples in full."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, message: str) -> None:
        """Count one problem."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(message)

    def merge(self, other: Problems) -> None:
        """Add what another worker counted. Merge in shard order to keep the examples independent of workers."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
        self.examples = [*self.examples, *other.examples][:EXAMPLES_KEPT]

    @property
    def total(self) -> int:
        """How many problems, empty documents included."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for a manifest."""
        return {"counts": dict(sorted(self.counts.items())), "examples": list(self.examples)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Problems:
        """The inverse of `to_dict`."""
        return cls(counts=dict(values["counts"]), examples=list(values["examples"]))


@dataclass
class Policy:
    """Stop at the first problem, or count it and go on. Readers report here and never decide themselves."""

    on_error: OnError
    problems: Problems

    def report(self, kind: str, message: str, *, hint: str | None = None) -> None:
        """Raise DataError under "stop"; count under "skip"."""
        if self.on_error == "stop":
            advice = hint or "mend the data, or set data.on_error: skip to leave such parts out and count them"
            raise DataError(message, hint=advice)
        self.problems.add(kind, message)

    def note_empty(self, where: str) -> None:
        """An empty document is no error (think of `__init__.py`), but it is counted."""
        self.problems.add("empty", f"{where}: empty")


def split_of(document_key: str, fraction: float, seed: int) -> Literal["train", "validation"]:
    """The split of a document, by a hash of its key: the same on every machine, whatever else is in the data set.

    A larger `fraction` only moves documents from train to validation, never back.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"the validation fraction is {fraction}; expected a number from 0 up to, not including, 1")
    digest = hashlib.blake2b(f"{seed}\x1f{document_key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < fraction * 2**64 else "train"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'text'?` where some known name is close, else nothing."""
    from difflib import get_close_matches

    names = list(known)
    by_case = [name for name in names if name.lower() == word.lower()]
    close = by_case or get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def fields_seen(wanted: str, names: Iterable[str]) -> str:
    """`it has a, b, c; did you mean 'b'?`, with long names and long lists cut, for messages about a missing field."""
    known = list(names)
    shown = [name if len(name) <= 40 else name[:40] + "..." for name in known[:20]]
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"it has {', '.join(shown) or 'no fields'}{more}{nearest(wanted, known)}"
