"""Tiny tasks made of records, for the tests of examples: a token is a character, so that arrays can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainwright.base.errors import DataError
from trainwright.data.documents import Problems, SourceSpec
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.example import IGNORE, Encoded, Example, Feature, Piece
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.spec import TrainTokenizer
from trainwright.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TinyRecord:
    fields: Mapping[str, Any]
    where: str
    key: str


def read_lines(
    source: SourceSpec,
    shape: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_error: Any = "stop",
    problems: Problems | None = None,
    **reading: Any,
) -> Iterator[TinyRecord]:
    """One JSON object a line; a line that is none is a problem."""
    path = Path(source.source)
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        if not line:
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            if on_error == "stop":
                raise DataError(f"{path}:{number}: not JSON") from None
            assert problems is not None
            problems.add("bad-json", f"{path}:{number}: not JSON")
            continue
        yield TinyRecord(fields, f"{path.name}:{number}", f"{path.name}:{number}")


@dataclass(frozen=True)
class PairEncoder:
    """source + target as one sequence, the target trained; what is longer is cut, what has no target is dropped."""

    tokenizer: Tokenizer
    max_length: int
    stride: int = 0
    packable: bool = True
    must_train_ids: tuple[int, ...] = ()
    features = (
        Feature("input_ids", "int32", "tokens"),
        Feature("labels", "int32", "tokens"),
        Feature("weights", "float32", "tokens", pad=-1.0),
    )

    @property
    def fingerprint(self) -> str:
        return f"pair {self.max_length} {self.stride}"

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        source, target = record.get("source"), record.get("target")
        if not isinstance(source, str):
            raise DataError("column 'source' is missing", hint="write one")
        if not target:
            return Encoded(dropped="no target")
        prompt = self.tokenizer.encode(source)
        ids = [*prompt, *self.tokenizer.encode(target)]
        if self.tokenizer.eos_id is not None:
            ids.append(self.tokenizer.eos_id)
        labels = [IGNORE] * (len(prompt) - 1) + ids[len(prompt) :] + [IGNORE]
        if not prompt:
            labels = [*ids[1:], IGNORE]
        size = self.max_length
        pieces = [(0, size)] if not self.stride else [(b, b + size) for b in range(0, len(ids), self.stride)]
        examples = tuple(
            Example(
                {
                    "input_ids": np.asarray(ids[begin:end], dtype=np.int32),
                    "labels": np.asarray(labels[begin:end], dtype=np.int32),
                    "weights": np.linspace(0, 1, len(ids[begin:end]), dtype=np.float32),
                },
                Piece(index, len(pieces), {"start": begin} if self.stride else {}),
            )
            for index, (begin, end) in enumerate(pieces)
        )
        return Encoded(examples, cut_tokens=0 if self.stride else max(0, len(ids) - size))


@dataclass(frozen=True)
class LabelEncoder:
    """A text, a class or a number, and features of every axis."""

    tokenizer: Tokenizer
    max_length: int
    labels: tuple[str, ...]
    numbers: bool = False
    packable: bool = False

    @property
    def features(self) -> tuple[Feature, ...]:
        return (
            Feature("input_ids", "int32", "tokens", pad=1),
            Feature("token_type_ids", "int32", "tokens", pad=0),
            Feature("labels", "float32" if self.numbers else "int64", "row"),
            Feature("decoder_input_ids", "int32", "target", pad=2),
            Feature("box", "float32", "row", shape=(2, 2)),
        )

    @property
    def fingerprint(self) -> str:
        return json.dumps(["label", self.max_length, self.labels, self.numbers])

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        ids = self.tokenizer.encode(record["text"])
        label: Any = record["label"] if self.numbers else self.labels.index(record["label"])
        arrays = {
            "input_ids": np.asarray(ids[: self.max_length]),
            "token_type_ids": np.arange(len(ids[: self.max_length])) % 2,
            "labels": np.asarray(label),
            "decoder_input_ids": np.arange(int(record.get("out", 0))),
            "box": np.full((2, 2), len(ids), dtype=np.float32),
        }
        return Encoded((Example(arrays),), cut_tokens=max(0, len(ids) - self.max_length))


@dataclass
class Tiny:
    """A definition: `kind` "pair" or "label"."""

    kind: str = "pair"
    max_length: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: tuple[str, ...] = ()
    surveys: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"tiny-{self.kind}"

    @property
    def shape(self) -> str:
        return "pair" if self.kind == "pair" else "labelled"

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        found = [record.get("label") for record in records]
        self.surveys.append(len(found))
        names = sorted({one for one in found if isinstance(one, str)})
        return {"labels": tuple(names), "records": len(found)}

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> Bound:
        if self.kind == "pair":
            return Bound(PairEncoder(tokenizer, self.max_length, **self.options))
        return Bound(LabelEncoder(tokenizer, self.max_length, tuple(survey["labels"]), **self.options))


@dataclass(frozen=True)
class Bound:
    encoder: Any


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> SourceSpec:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
    return SourceSpec(str(path), name=path.stem)


def pairs(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Records whose examples have these lengths: source, target, and the end of text."""
    letters = "abcdefghij"
    return [
        {"source": "".join(letters[(i + j) % 10] for j in range(n - 2 - n // 3)), "target": "x" * (n // 3 + 1)}
        for i, n in enumerate(lengths)
    ]


def build(
    folder: Path, records: Sequence[Mapping[str, Any]], definition: Tiny | None = None, **options: Any
) -> ExampleDataset:
    """Examples of these records, a token a character, no validation."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_records(folder / "records.jsonl", records)
    definition = definition or Tiny()
    options = {
        "validation": None,
        "tokenizer": TrainTokenizer("char"),
        "sequence_length": definition.max_length,
        **options,
    }
    spec = ExampleSpec((source,), **options)
    return build_examples(spec, definition, folder / "cache", workers=1, reader=read_lines)
