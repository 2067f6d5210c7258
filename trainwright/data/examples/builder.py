"""One build of examples, from an empty hidden folder to a complete one that only needs its name."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.events import emit
from trainwright.base.faults import fault_point
from trainwright.data.builder import BuildProgress, Progress
from trainwright.data.chosen_tokenizer import trained_tokenizer
from trainwright.data.corpus import Corpus, check_unchanged
from trainwright.data.examples.build import (
    BoundTask,
    ExampleDefinition,
    ReadRecords,
    as_json,
    prepared,
    sides,
    special_tokens,
)
from trainwright.data.examples.counting import Tally, finish_rows, read_flat, split_facts, trained_labels
from trainwright.data.examples.encoding import BATCH_RECORDS, Refusal, encode_all
from trainwright.data.examples.example import Encoded, Feature
from trainwright.data.examples.intake import Intake, SplitRecords, stored_records
from trainwright.data.examples.manifest import ExampleFacts, ExampleManifest
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.examples.storage import ExampleWriter, check_features
from trainwright.data.examples.texts import record_texts
from trainwright.data.finish import UNKNOWN_WARNING
from trainwright.data.manifest import MANIFEST_NAME
from trainwright.data.spec import TrainTokenizer, default_workers
from trainwright.data.storage import fsync_folder, hash_file, write_bytes

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["Builder"]

CUT_WARNING = 0.05


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

    def run(self) -> ExampleManifest:
        def report(done: int, records: int) -> None:
            self._report("records", done, self.corpus.bytes, records)

        splits = Intake(self.spec, self.definition.shape, self.folder, self.reader, report).read()
        check_unchanged(self.corpus)
        tokenizer = self._tokenizer()
        self.survey = as_json(self.definition.survey(stored_records(self.folder, "train")))
        write_bytes(self.folder / "survey.json", json.dumps(self.survey, ensure_ascii=False, indent=1).encode("utf-8"))
        bound = self.definition.bind(self.survey, tokenizer)
        features = tuple(bound.encoder.features)
        check_features(features)
        self._check_packing(bound, features)
        facts = {split: self._encode(split, read, bound, tokenizer) for split, read in splits.items()}
        return self._finish(bound, features, facts, tokenizer)

    # ---- tokenizer

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, saved in the folder: given, or trained on the texts of the training records."""
        tokenizer = self.given
        if tokenizer is None:
            assert isinstance(self.spec.tokenizer, TrainTokenizer)
            self._report("tokenizer", 0, 1, 0)
            records = stored_records(self.folder, "train")
            of_record = getattr(self.definition, "texts", partial(record_texts, self.definition.shape))
            texts = (text for one in records for text in of_record(one))
            tokenizer = trained_tokenizer(self.spec.tokenizer, partial(_first, texts), special_tokens(self.definition))
        tokenizer = prepared(self.definition, tokenizer)
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

    def _encode(self, split: str, read: SplitRecords, bound: BoundTask, tokenizer: Tokenizer) -> ExampleFacts:
        writer = ExampleWriter(self.folder, split, bound.encoder.features)
        tally, number = Tally(), 0
        batches = _batches(stored_records(self.folder, split))
        try:
            with closing(encode_all(bound.encoder, batches, self.workers, read.records)) as encoded:
                for records, results in encoded:
                    fault_point("examples.encode", split=split, number=number)
                    for record, result in zip(records, results, strict=True):
                        self._keep(writer, tally, number, record["where"], result)
                        number += 1
                    self._report(split, number, read.records, number)
            writer.finish()
        finally:
            writer.close()
        if split == "train" and not tally.trained:
            raise DataError(
                f"none of the {read.records:,} training records gives an example: "
                + "; ".join(f"{count:,} {reason}" for reason, count in tally.dropped.counts.items())
                + "".join(f"\n     {line}" for line in tally.dropped.examples[:5]),
                hint="see the reasons above; the records may be of another format, or longer than data.sequence_length",
            )
        packed = split == "train" and self.spec.packing == "best_fit"
        groups = finish_rows(self.folder, split, read.groups, self.spec.sequence_length, packed=packed)
        return split_facts(self.folder, split, read, tally, groups, bound.encoder, tokenizer.unk_id, packed=packed)

    def _keep(self, writer: ExampleWriter, tally: Tally, number: int, where: str, result: Encoded | Refusal) -> None:
        """Store what became of a record, or count why it became nothing."""
        if isinstance(result, Refusal):
            message = result.message if result.message.startswith(where) else f"{where}: {result.message}"
            if self.spec.on_error == "stop":
                raise DataError(message, hint=result.hint)
            tally.dropped.add("unusable", message)
            return
        if result.cut_tokens:
            tally.truncated += 1
            tally.cut_tokens += result.cut_tokens
        if not result.examples:
            reason = result.dropped or "no example"
            tally.dropped.add(reason, f"{where}: {reason}")
        for example in result.examples:
            if not 1 <= example.length <= self.spec.sequence_length:
                raise DataError(
                    f"{where}: the task {self.definition.name} made an example of {example.length} tokens; expected "
                    f"1 to {self.spec.sequence_length}",
                    hint="this is a fault of the task's encoder, not of the record",
                )
            writer.add(number, example)
            tally.trained.append(trained_labels(example.arrays["labels"]))

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
            sources=self._sources(),
            target_lengths={
                feature.name: max(self._longest(f"{split}.{feature.name}.idx") for split in facts)
                for feature in features
                if feature.axis == "target"
            },
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

    def _longest(self, name: str) -> int:
        ends = read_flat(self.folder, name, "<u8").astype(np.int64)
        return int((ends[1:] - ends[:-1]).max(initial=0))

    def _sources(self) -> list[dict[str, Any]]:
        """What the manifest says of every source, and for which split it is."""
        held = self.spec.validation.sources if self.spec.validation else ()
        named = {"train": self.spec.train, "validation": held, "test": self.spec.test}
        roles = [split for split, of in named.items() for one in of for _ in sides(one, self.definition.shape)]
        return [{**source.facts(), "split": role} for source, role in zip(self.corpus.sources, roles, strict=True)]

    def _report(self, phase: str, done: int, total: int, records: int) -> None:
        if self.progress is not None:
            spent = time.monotonic() - self._began
            self.progress(BuildProgress(phase, min(done, total), max(total, 1), 0, records, spent))


def _batches(records: Iterator[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    while batch := list(itertools.islice(records, BATCH_RECORDS)):
        yield batch


def _first(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """Texts from the beginning, until there are so many characters; None: all."""
    if characters is None:
        yield from texts
        return
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
                "knows too few words of this text"
            )
        if one.truncated > CUT_WARNING * one.records:
            notes.append(
                f"{one.truncated:,} of the {one.records:,} {split} records ({one.truncated / one.records:.1%}) do not "
                f"fit in {spec.sequence_length} tokens and were cut; raise data.sequence_length to keep them whole"
            )
    return notes
