"""The manifest of a built dataset: everything that can be known of it without reading its tokens, as strict JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.mixture import RowGroup
from trainwright.data.storage import FileFacts

__all__ = ["MANIFEST_NAME", "SCHEMA", "Manifest", "SplitFacts", "damage_named", "manifest_values", "read_manifest"]

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
KIND = "trainwright.dataset"


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split. Tokens are ids in the token file; inputs are row slots that hold a token."""

    documents: int
    tokens: int
    characters: int
    bytes: int
    """Of the text in UTF-8: what bits per byte divides by."""
    unknown_tokens: int
    rows: int
    inputs: int
    """Row slots that hold a token; the rest of rows * sequence_length is padding."""
    trained_tokens: int
    """Labels that are not -100, over all rows of one epoch."""
    split_documents: int
    """Documents cut because they are longer than a row (each cut loses the context before it)."""
    dropped_documents: int
    """Documents too short to train anything: fewer than two tokens."""
    groups: tuple[RowGroup, ...]
    group_tokens: tuple[int, ...]
    """Tokens of each group; the groups stand one behind the other in the token file."""

    def padding_share(self, sequence_length: int) -> float:
        slots = self.rows * sequence_length
        return 1 - self.inputs / slots if slots else 0.0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SplitFacts:
        groups = tuple(RowGroup(**group) for group in value["groups"])
        return cls(**{**value, "groups": groups, "group_tokens": tuple(value["group_tokens"])})


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds and what it was made from. Nothing in it depends on time, machine or worker count."""

    key: str
    """Hash of everything the build depends on; the same key means the same bytes."""
    token_dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    """What fills row slots that hold no token: the tokenizer's own pad id, else its end of text, else 0."""
    sequence_length: int
    packing: str
    document_mask: bool
    append_eos: bool
    prepend_bos: bool
    splits: dict[str, SplitFacts]
    sources: list[dict[str, Any]]
    """Per source: name, weight, validation rule, documents, and its shards with size and content hash."""
    problems: dict[str, int]
    """Documents and lines left out, by kind (invalid_json, invalid_utf8, ...)."""
    problem_examples: list[str]
    files: dict[str, FileFacts]
    notes: list[str] = field(default_factory=list)
    """Warnings that held when it was built, such as a tokenizer that does not know the text."""
    schema: int = SCHEMA

    @property
    def fingerprint(self) -> str:
        """Names the rows: equal fingerprints give the same rows for the same seed, wherever the folder lies."""
        rows = {
            "files": {
                name: facts.to_json() for name, facts in sorted(self.files.items()) if not name.startswith("tokenizer/")
            },
            "tokenizer": self.tokenizer_fingerprint,
            "layout": [self.token_dtype, self.sequence_length, self.packing, self.document_mask, self.pad_id],
            "groups": {name: [asdict(group) for group in facts.groups] for name, facts in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:32]

    def split(self, name: str) -> SplitFacts:
        if name not in self.splits:
            raise DataError(
                f"the dataset has no split {name!r}; it has: {', '.join(self.splits)}",
                hint="set data.validation in the recipe to hold text out" if name == "validation" else None,
            )
        return self.splits[name]

    def to_json(self) -> str:
        value = asdict(self)
        value["files"] = {name: facts.to_json() for name, facts in sorted(self.files.items())}
        return json.dumps({"kind": KIND, **value}, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`. Raises DataError when it is missing, malformed or of another schema."""
    value = manifest_values(folder, KIND, SCHEMA, what="a dataset")
    with damage_named(folder):
        splits = {name: SplitFacts.from_json(split) for name, split in value.pop("splits").items()}
        files = {name: FileFacts.from_json(facts) for name, facts in value.pop("files").items()}
        return Manifest(**value, splits=splits, files=files)


def manifest_values(folder: Path, kind: str, schema: int, *, what: str) -> dict[str, Any]:
    """The JSON object of a folder's manifest, of this kind and schema; `what` it is the manifest of, for messages."""
    path = folder / MANIFEST_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a built dataset: it has no {MANIFEST_NAME}",
            hint="build one with `trainwright data build RECIPE`",
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="delete the folder and build it again") from error
    if not isinstance(value, dict) or value.pop("kind", None) != kind:
        raise DataError(f"{path} is not the manifest of {what}", hint="give the folder that `data build` wrote")
    if value.get("schema") != schema:
        raise DataError(
            f"{path} has schema {value.get('schema')!r}; this version reads schema {schema}",
            hint="build the dataset again with this version",
        )
    return value


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Inside, whatever a malformed manifest makes Python raise becomes a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = folder / MANIFEST_NAME
        raise DataError(f"{path} is damaged: {error!r}", hint="delete the folder and build it again") from error
