"""What a folder of examples holds and what it was made from, as strict JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainwright.base.errors import DataError
from trainwright.data.examples.example import Feature
from trainwright.data.manifest import MANIFEST_NAME, damage_named, manifest_values
from trainwright.data.mixture import RowGroup
from trainwright.data.records.record import NOTES
from trainwright.data.storage import FileFacts

__all__ = ["KIND", "SCHEMA", "ExampleFacts", "ExampleManifest", "is_examples", "read_example_manifest"]

SCHEMA = 1
KIND = "trainwright.examples"


@dataclass(frozen=True)
class ExampleFacts:
    """Counts of one split."""

    records: int
    """Records that were read, those that gave no example included."""
    examples: int
    rows: int
    packed: bool
    inputs: int
    """Input tokens of all examples: row slots that hold a token."""
    trained_tokens: int
    """Labels that are trained, over all rows of one epoch: tokens, words or texts, as the task has them."""
    untrained_examples: int
    """Examples without a trained label."""
    longest: int
    """Input tokens of the longest example."""
    truncated: int
    """Records that did not fit whole."""
    cut_tokens: int
    dropped: dict[str, int]
    """Records that gave no example, by reason."""
    dropped_examples: list[str]
    skipped: dict[str, int]
    """Records that could not be read, by kind (on_error: skip)."""
    repaired: dict[str, int]
    """What was mended in records, or parts of them that were left out, by kind; the records are used."""
    skipped_examples: list[str]
    groups: tuple[RowGroup, ...]
    unknown_tokens: int = 0
    """Input tokens that are the tokenizer's unknown token."""
    must_train: dict[str, int] = field(default_factory=dict)
    """How often each token that must be trained is (by id): the end of a turn, of a text."""

    def padding_share(self, sequence_length: int) -> float:
        """Share of padding where every row has `sequence_length` slots, as packed and static ones have."""
        slots = self.rows * sequence_length
        return 1 - self.inputs / slots if slots else 0.0

    @property
    def dropped_records(self) -> int:
        return sum(self.dropped.values())

    @property
    def skipped_records(self) -> int:
        return sum(count for kind, count in self.skipped.items() if kind not in NOTES)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ExampleFacts:
        return cls(**{**value, "groups": tuple(RowGroup(**group) for group in value["groups"])})


@dataclass(frozen=True)
class ExampleManifest:
    """Nothing in it depends on time, machine or worker count, but for the places of records in files."""

    key: str
    """Hash of the sources, how they are read and split, the tokenizer and the rows: all but the task."""
    task: str
    """The task's options as text, of the build that made it."""
    definition: str
    """Name of the task."""
    shape: str
    encoder: str
    """The encoder's fingerprint."""
    features: tuple[Feature, ...]
    sequence_length: int
    packing: str
    vocab_size: int
    tokenizer_fingerprint: str
    splits: dict[str, ExampleFacts]
    sources: list[dict[str, Any]]
    target_lengths: dict[str, int]
    """The longest of each feature of the axis "target", over all splits: what static batches are padded to."""
    files: dict[str, FileFacts]
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def fingerprint(self) -> str:
        """Names the rows: equal fingerprints give the same rows for the same seed, wherever the folder lies."""
        arrays = {
            name: facts.to_json()
            for name, facts in sorted(self.files.items())
            if not name.startswith("tokenizer/") and ".records." not in name  # records tell where their files lie
        }
        rows = {
            "files": arrays,
            "tokenizer": self.tokenizer_fingerprint,
            "features": [asdict(feature) for feature in self.features],
            "layout": [self.sequence_length, self.packing],
            "groups": {name: [asdict(group) for group in facts.groups] for name, facts in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:32]

    def split(self, name: str) -> ExampleFacts:
        if name not in self.splits:
            raise DataError(
                f"the dataset has no split {name!r}; it has: {', '.join(self.splits)}",
                hint={
                    "validation": "set data.validation in the recipe to hold records out",
                    "test": "set data.test in the recipe",
                }.get(name),
            )
        return self.splits[name]

    def to_json(self) -> str:
        value = asdict(self)
        value["files"] = {name: facts.to_json() for name, facts in sorted(self.files.items())}
        return json.dumps({"kind": KIND, **value}, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def is_examples(folder: Path) -> bool:
    """Whether a folder holds built examples (and not, say, a dataset of running text)."""
    try:
        value = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("kind") == KIND


def read_example_manifest(folder: Path) -> ExampleManifest:
    """Read and check `folder/manifest.json`. Raises DataError when it is missing, malformed or of another schema."""
    value = manifest_values(folder, KIND, SCHEMA, what="examples")
    with damage_named(folder):
        splits = {name: ExampleFacts.from_json(split) for name, split in value["splits"].items()}
        value["splits"] = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
        value["files"] = {name: FileFacts.from_json(facts) for name, facts in value["files"].items()}
        value["features"] = tuple(Feature(**{**one, "shape": tuple(one["shape"])}) for one in value["features"])
        return ExampleManifest(**{one.name: value.pop(one.name) for one in fields(ExampleManifest)}, **value)
