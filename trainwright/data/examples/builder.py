"""One build of examples, from an empty hidden folder to a complete one that only needs its name."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.events import emit
from trainwright.base.faults import fault_point
from trainwright.data.build import SAMPLE_CHARACTERS, BuildProgress
from trainwright.data.corpus import SPLIT_SEED, Corpus, check_unchanged
from trainwright.data.dataset import IGNORE
from trainwright.data.documents import EXAMPLES_KEPT, Problems, SourceSpec
from trainwright.data.examples.build import (
    BoundTask,
    ExampleDefinition,
    Progress,
    ReadRecords,
    as_json,
    sides,
    special_tokens,
)
from trainwright.data.examples.encoding import BATCH_RECORDS, Refusal, encode_all
from trainwright.data.examples.example import Encoded, Feature
from trainwright.data.examples.manifest import ExampleFacts, ExampleManifest
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.examples.storage import ExampleWriter, LineWriter, check_features, read_records, record_line
from trainwright.data.examples.texts import record_texts
from trainwright.data.finish import UNKNOWN_WARNING
from trainwright.data.manifest import MANIFEST_NAME
from trainwright.data.mixture import RowGroup
from trainwright.data.packing import WINDOW, best_fit
from trainwright.data.spec import TrainTokenizer, default_workers
from trainwright.data.storage import fsync_folder, hash_file, write_array, write_bytes

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["Builder"]

# Below this much text in records, starting a process (it imports the task, and torch with it: seconds) costs more than
# it saves.
FEWEST_BYTES_PER_WORKER = 16 << 20
CUT_WARNING = 0.05


@dataclass
class _Split:
    """What is known of a split so far."""

    bytes: int = 0
    groups: list[tuple[str, float | None, int]] = field(default_factory=list)
    """Name, weight and number of records of every source that is drawn separately."""
    skipped: Problems = field(default_factory=Problems)
    dropped: Problems = field(default_factory=Problems)
    truncated: int = 0
    cut_tokens: int = 0

    @property
    def records(self) -> int:
        return sum(count for _, _, count in self.groups)


class Builder:
    """Use `run` once. `survey` is what the task said of the training records, afterwards."""

    def __init__(
        self,
        spec: ExampleSpec,
        definition: ExampleDefinition,
        corpus: Corpus,
        tokenizer: Tokenizer | None,
        key: str,
        folder: Path,
        reader: ReadRecords,
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        self.spec = spec
        self.definition = definition
        self.corpus = corpus
        self.given = tokenizer
        self.key = key
        self.folder = folder
        self.reader = reader
        self.workers = default_workers() if workers is None else workers
        if self.workers < 1:
            raise ConfigError(f"workers is {workers}; expected at least 1")
        self.progress = progress
        self.survey: dict[str, Any] = {}
        self._began = time.monotonic()
        self._splits: dict[str, _Split] = {}

    def run(self) -> ExampleManifest:
        self._read_sources()
        check_unchanged(self.corpus)
        tokenizer = self._tokenizer()
        self.survey = as_json(self.definition.survey(self._fields("train")))
        write_bytes(self.folder / "survey.json", json.dumps(self.survey, ensure_ascii=False, indent=1).encode("utf-8"))
        bound = self.definition.bind(self.survey, tokenizer)
        features = tuple(bound.encoder.features)
        check_features(features)
        self._check_packing(bound, features)
        facts = {split: self._encode(split, bound, features, tokenizer) for split in self._splits}
        if not facts["train"].examples:
            lost = facts["train"]
            raise DataError(
                f"none of the {lost.records:,} training records gives an example: "
                + "; ".join(f"{count:,} {reason}" for reason, count in lost.dropped.items())
                + "".join(f"\n     {line}" for line in lost.dropped_examples[:5]),
                hint="see the reasons above; the records may be of another format, or longer than data.sequence_length",
            )
        return self._finish(bound, features, facts, tokenizer)

    # ---- records

    def _read_sources(self) -> None:
        spec = self.spec
        self._splits["train"] = _Split()
        if spec.fraction:
            self._splits["validation"] = _Split()
            self._read_and_divide()
        else:
            self._read("train", spec.train, weighted=spec.weighted)
            if spec.validation is not None:
                self._splits["validation"] = _Split()
                self._read("validation", spec.validation.sources)
        if spec.test:
            self._splits["test"] = _Split()
            self._read("test", spec.test)
        for split, found in self._splits.items():
            if not found.records:
                names = {"train": spec.train, "test": spec.test}.get(
                    split, spec.validation.sources if spec.validation and spec.validation.sources else spec.train
                )
                skipped = ", ".join(f"{count:,} {kind}" for kind, count in found.skipped.counts.items())
                raise DataError(
                    f"no {split} records in {', '.join(source.label for source in names)}"
                    + (f" (skipped: {skipped})" if skipped else ""),
                    hint="check data.source, data.format and data.columns"
                    if split == "train"
                    else f"check data.{split}, or leave it out",
                )

    def _read(self, split: str, sources: Sequence[SourceSpec], *, weighted: bool = False) -> None:
        """The records of sources into the file of a split."""
        found = self._splits[split]
        lines = LineWriter(self.folder, f"{split}.records")
        try:
            for source in sources:
                before = len(lines.ends)
                for line, _ in self._lines(source, found.skipped, lines.ends[-1]):
                    lines.add(line)
                found.groups.append((source.label, source.weight if weighted else None, len(lines.ends) - before))
            lines.finish()
        finally:
            lines.close()
        found.bytes = lines.ends[-1]

    def _lines(self, source: SourceSpec, skipped: Problems, done: int) -> Iterator[tuple[bytes, str]]:
        """Each record of a source as it is stored, and its key."""
        spec = self.spec
        records = self.reader(
            source,
            self.definition.shape,
            format=spec.format,
            columns=spec.columns,
            on_error=spec.on_error,
            problems=skipped,
            **spec.reading,
        )
        for number, record in enumerate(records):
            line = record_line(record.fields, record.where, record.key)
            done += len(line)
            if number % 4096 == 0:
                fault_point("examples.read", number=number)
                self._report("records", done, number)
            yield line, record.key

    def _read_and_divide(self) -> None:
        """Training records into one file, then line by line into the two splits, by the hash of their keys."""
        train, held = self._splits["train"], self._splits["validation"]
        scratch = self.folder / "records.all"
        hashes: list[int] = []
        counts: list[int] = []
        done = 0
        with scratch.open("wb") as file:
            for source in self.spec.train:
                before = len(hashes)
                for line, key in self._lines(source, train.skipped, done):
                    file.write(line + b"\n")
                    done += len(line) + 1
                    hashes.append(_hash_of(key))
                counts.append(len(hashes) - before)
        out = held_out(np.asarray(hashes, dtype=np.uint64), self.spec.fraction)
        writers = {split: LineWriter(self.folder, f"{split}.records") for split in ("train", "validation")}
        try:
            with scratch.open("rb") as file:
                for line, is_held in zip(file, out.tolist(), strict=True):
                    writers["validation" if is_held else "train"].add(line[:-1])
            for writer in writers.values():
                writer.finish()
        finally:
            for writer in writers.values():
                writer.close()
        os.unlink(scratch)
        begin = 0
        for source, count in zip(self.spec.train, counts, strict=True):
            kept = int((~out[begin : begin + count]).sum())
            train.groups.append((source.label, source.weight if self.spec.weighted else None, kept))
            held.groups.append((source.label, None, count - kept))
            begin += count
        train.bytes, held.bytes = writers["train"].ends[-1], writers["validation"].ends[-1]

    def _fields(self, split: str) -> Iterator[Mapping[str, Any]]:
        for record in read_records(self.folder / f"{split}.records.jsonl"):
            yield record["fields"]

    # ---- tokenizer

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, saved in the folder: given, or trained on the texts of the training records."""
        from trainwright.data.tokenizers import train_tokenizer

        tokenizer = self.given
        if tokenizer is None:
            assert isinstance(self.spec.tokenizer, TrainTokenizer)
            training = self.spec.tokenizer
            self._report("tokenizer", 0, 0)
            texts = (text for one in self._fields("train") for text in record_texts(self.definition.shape, one))
            # every character or word must be seen to be counted; merges need only a sample
            merges = training.kind in ("bpe", "wordpiece")
            tokenizer = train_tokenizer(
                training.kind,
                None if training.kind == "char" else training.vocab_size,
                _first(texts, SAMPLE_CHARACTERS) if merges else texts,
                added=special_tokens(self.definition),
                min_frequency=training.min_frequency,
                lowercase=training.lowercase,
            )
        prepare = getattr(self.definition, "prepare_tokenizer", None)
        if prepare is not None:  # the chat template that examples are rendered by stays with them
            tokenizer = prepare(tokenizer)
        tokenizer.save(self.folder / "tokenizer")
        return tokenizer

    # ---- examples

    def _check_packing(self, bound: BoundTask, features: Sequence[Feature]) -> None:
        if self.spec.packing == "pad":
            return
        apart = [feature.name for feature in features if feature.axis != "tokens"]
        if not bound.encoder.packable or apart:
            why = f": {', '.join(apart)} belong to a whole example" if apart else ""
            raise ConfigError(
                f"examples of the task {self.definition.name} cannot share rows{why}", hint="set data.packing: pad"
            )

    def _encode(
        self, split: str, bound: BoundTask, features: tuple[Feature, ...], tokenizer: Tokenizer
    ) -> ExampleFacts:
        found = self._splits[split]
        writer = ExampleWriter(self.folder, split, features)
        workers = max(1, min(self.workers, found.bytes // FEWEST_BYTES_PER_WORKER))
        stored = read_records(self.folder / f"{split}.records.jsonl")
        wheres: list[list[str]] = []

        def batches() -> Iterator[list[Mapping[str, Any]]]:
            while batch := list(itertools.islice(stored, BATCH_RECORDS)):
                wheres.append([one["where"] for one in batch])
                yield [one["fields"] for one in batch]

        number = 0
        trained: list[int] = []
        try:
            for _, results in encode_all(bound.encoder, batches(), workers):
                fault_point("examples.encode", split=split, number=number)
                for where, result in zip(wheres.pop(0), results, strict=True):
                    self._keep(writer, found, number, where, result, trained)
                    number += 1
                self._report(split, int(found.bytes * number / max(found.records, 1)), number)
            writer.finish()
        finally:
            writer.close()
        return self._facts(split, bound, np.asarray(trained, dtype=np.int64), tokenizer)

    def _keep(
        self,
        writer: ExampleWriter,
        found: _Split,
        number: int,
        where: str,
        result: Encoded | Refusal,
        trained: list[int],
    ) -> None:
        """Store what became of a record, or count why it became nothing."""
        if isinstance(result, Refusal):
            message = result.message if result.message.startswith(where) else f"{where}: {result.message}"
            if self.spec.on_error == "stop":
                raise DataError(message, hint=result.hint)
            found.dropped.add("unusable", message)
            return
        if result.cut_tokens:
            found.truncated += 1
            found.cut_tokens += result.cut_tokens
        if not result.examples:
            reason = result.dropped or "no example"
            found.dropped.add(reason, f"{where}: {reason}")
        for example in result.examples:
            if not 1 <= example.length <= self.spec.sequence_length:
                raise DataError(
                    f"{where}: the task {self.definition.name} made an example of {example.length} tokens; expected "
                    f"1 to {self.spec.sequence_length}",
                    hint="this is a fault of the task's encoder, not of the record",
                )
            writer.add(number, example)
            trained.append(_trained(example.arrays["labels"]))

    def _facts(self, split: str, bound: BoundTask, trained: NDArray[np.int64], tokenizer: Tokenizer) -> ExampleFacts:
        found = self._splits[split]
        ends = self._read_array(f"{split}.tokens.idx", "<u8").astype(np.int64)
        lengths = ends[1:] - ends[:-1]
        records = self._read_array(f"{split}.record.idx", "<u8").astype(np.int64)
        packed = split == "train" and self.spec.packing == "best_fit"
        weighted = any(weight is not None for _, weight, _ in found.groups)
        named = found.groups if weighted else [("all", None, found.records)]
        stops = np.searchsorted(records, np.cumsum([count for _, _, count in named])).tolist()
        groups, tables, first = [], [], 0
        for (name, weight, _), begin, end in zip(named, [0, *stops], stops, strict=False):
            if weighted and end == begin:
                raise DataError(f"no training examples from {name}, which the mixture draws from")
            table = pack_examples(lengths[begin:end], self.spec.sequence_length) if packed else None
            rows = end - begin if table is None else len(table[0]) - 1
            groups.append(RowGroup(name, first, rows, weight))
            first += rows
            if table is not None:
                tables.append((table[0], table[1] + begin))
        if packed:
            self._write_rows(split, tables)
        inputs = self._read_array(f"{split}.input_ids.bin", "<i4" if self._narrow(bound) else "<i8")
        labels = self._read_array(f"{split}.labels.bin", _stored(bound, "labels"))
        must = tuple(getattr(bound.encoder, "must_train_ids", ()))
        return ExampleFacts(
            records=found.records,
            examples=len(lengths),
            rows=first,
            packed=packed,
            inputs=int(lengths.sum()),
            trained_tokens=int(trained.sum()),
            untrained_examples=int((trained == 0).sum()),
            longest=int(lengths.max(initial=0)),
            truncated=found.truncated,
            cut_tokens=found.cut_tokens,
            dropped=dict(sorted(found.dropped.counts.items())),
            dropped_examples=found.dropped.examples[:EXAMPLES_KEPT],
            skipped=dict(sorted(found.skipped.counts.items())),
            skipped_examples=found.skipped.examples[:EXAMPLES_KEPT],
            groups=tuple(groups),
            unknown_tokens=0 if tokenizer.unk_id is None else int((inputs == tokenizer.unk_id).sum()),
            must_train={str(one): int((labels == one).sum()) for one in must},
        )

    def _narrow(self, bound: BoundTask) -> bool:
        return _stored(bound, "input_ids") == "<i4"

    def _read_array(self, name: str, dtype: str) -> NDArray[Any]:
        path = self.folder / name
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)

    def _write_rows(self, split: str, tables: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
        examples = np.concatenate([examples for _, examples in tables])
        starts, done = [], 0
        for bounds, of_group in tables:
            starts.append(bounds[:-1] + done)
            done += len(of_group)
        rows = np.concatenate([*starts, np.asarray([done])])
        write_array(self.folder / f"{split}.rows.idx", rows.astype(np.uint64))
        write_array(self.folder / f"{split}.rows.example", examples.astype(np.uint64))

    # ---- the end

    def _finish(
        self,
        bound: BoundTask,
        features: tuple[Feature, ...],
        facts: dict[str, ExampleFacts],
        tokenizer: Tokenizer,
    ) -> ExampleManifest:
        notes = _notes(facts, self.spec)
        for note in notes:
            emit("warning", message=note)
        targets = {
            feature.name: max(
                int(np.diff(self._read_array(f"{split}.{feature.name}.idx", "<u8").astype(np.int64)).max(initial=0))
                for split in facts
            )
            for feature in features
            if feature.axis == "target"
        }
        sources = [source.facts() for source in self.corpus.sources]
        named = {"train": self.spec.train, "test": self.spec.test}
        named["validation"] = self.spec.validation.sources if self.spec.validation else ()
        sides_of = {split: sum(len(sides(one, self.definition.shape)) for one in of) for split, of in named.items()}
        roles = [split for split in ("train", "validation", "test") for _ in range(sides_of[split])]
        for source, role in zip(sources, roles, strict=True):
            source["split"] = role
        manifest = ExampleManifest(
            key=self.key,
            task=self.spec.task,
            definition=self.definition.name,
            shape=self.definition.shape,
            encoder=bound.encoder.fingerprint,
            features=features,
            sequence_length=self.spec.sequence_length,
            packing=self.spec.packing,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            splits=facts,
            sources=sources,
            target_lengths=targets,
            files={
                path.relative_to(self.folder).as_posix(): hash_file(path)
                for path in sorted(self.folder.rglob("*"))
                if path.is_file()
            },
            notes=notes,
        )
        write_bytes(self.folder / MANIFEST_NAME, manifest.to_json().encode("utf-8"))
        fsync_folder(self.folder / "tokenizer")
        fsync_folder(self.folder)
        return manifest

    def _report(self, phase: str, done: int, records: int) -> None:
        if self.progress is not None:
            total = max(self.corpus.bytes, sum(split.bytes for split in self._splits.values()), 1)
            spent = time.monotonic() - self._began
            self.progress(BuildProgress(phase, min(done, total), total, 0, records, spent))


def held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which records are held out, bool [records]: those whose hash is below `fraction` of all hashes, but at least one,
    and never all. Raises DataError for fewer than two records, which cannot be divided."""
    if len(hashes) == 1:
        raise DataError(
            "one training record cannot be divided into training and validation",
            hint="add records, name data.validation sources, or set data.validation: none",
        )
    out: NDArray[np.bool_] = hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if len(hashes) and not out.any():
        out[int(np.argmin(hashes))] = True
    elif len(hashes) and out.all():
        out[int(np.argmax(hashes))] = False
    return out


def _hash_of(key: str) -> int:
    """The 64 bits by which `documents.split_of` chooses a split."""
    import hashlib

    digest = hashlib.blake2b(f"{SPLIT_SEED}\x1f{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def pack_examples(
    lengths: NDArray[np.int64], sequence_length: int, window: int = WINDOW
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole examples into rows by best-fit decreasing: (bounds [rows + 1], examples [examples]); row r holds
    examples[bounds[r]:bounds[r + 1]], in file order. Deterministic."""
    rows = np.empty(len(lengths), dtype=np.int64)
    used = 0
    for begin in range(0, len(lengths), window):
        bins = best_fit(lengths[begin : begin + window], sequence_length)
        rows[begin : begin + window] = bins + used
        used += int(bins.max()) + 1
    bounds = np.zeros(used + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=used), out=bounds[1:])
    return bounds, np.argsort(rows, kind="stable")


def _trained(labels: NDArray[Any]) -> int:
    """How many labels are trained."""
    array = np.asarray(labels)
    return int((~np.isnan(array)).sum() if array.dtype.kind == "f" else (array != IGNORE).sum())


def _stored(bound: BoundTask, name: str) -> str:
    kind = next(feature.dtype for feature in bound.encoder.features if feature.name == name)
    return {"int32": "<i4", "int64": "<i8", "float32": "<f4"}[kind]


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts from the beginning, until there are so many characters."""
    left = characters
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _notes(facts: Mapping[str, ExampleFacts], spec: ExampleSpec) -> list[str]:
    notes = []
    for split, one in facts.items():
        if one.unknown_tokens > UNKNOWN_WARNING * max(one.inputs, 1):
            notes.append(
                f"{one.unknown_tokens / one.inputs:.1%} of the {split} tokens are the tokenizer's unknown token: it "
                "was made for other text; train one on this text (data.tokenizer: {train: bpe}) or choose another"
            )
        if one.truncated > CUT_WARNING * one.records:
            notes.append(
                f"{one.truncated:,} of the {one.records:,} {split} records ({one.truncated / one.records:.1%}) do not "
                f"fit in {spec.sequence_length} tokens and were cut; raise data.sequence_length to keep them whole"
            )
    return notes
