"""Records in, a folder of examples out: atomic, and the same bytes however it was made.

    list files -> key -> (there? open) -> records of every split -> tokenizer -> survey -> bind
        -> examples -> rows -> hashes -> manifest -> rename

Everything is written to a hidden folder that is renamed when it is complete and durable. Records are read from their
sources once; they are kept with the examples, because reports and predictions are made of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainwright.base.errors import DataError
from trainwright.base.faults import fault_point
from trainwright.data.builder import Progress
from trainwright.data.chosen_tokenizer import given_tokenizer
from trainwright.data.corpus import Corpus, list_corpus
from trainwright.data.documents import SourceSpec
from trainwright.data.examples.checks import check_bounds
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.examples.manifest import SCHEMA, ExampleManifest, is_examples, read_example_manifest
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.exclusive import building
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec
from trainwright.data.storage import fsync_folder

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["BoundTask", "ExampleDefinition", "ReadRecords", "Record", "build_examples", "example_key"]


class Record(Protocol):
    """One record of a source: `data.records.records.Record`."""

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def where(self) -> str: ...

    @property
    def key(self) -> str: ...


ReadRecords = Callable[..., Iterator[Record]]
"""Records of one source, in file order: `data.records.reading.read_records`, called with (source, shape) and the
keywords format, columns, on_error, problems and those of `ExampleSpec.reading`."""


class BoundTask(Protocol):
    """A task that knows its labels and its tokenizer."""

    @property
    def encoder(self) -> ExampleEncoder: ...


class ExampleDefinition(Protocol):
    """A task before the data was seen (`tasks.task.TaskDefinition`).

    A definition may have `special_tokens`, a tuple of texts: tokens that a tokenizer trained for it must have (marks
    of entities, of turns); `texts`, which gives the texts of a record that such a tokenizer learns from;
    `prepare_tokenizer`, which gives the tokenizer to save, with another chat template; and
    `template`, the text that chooses that template. Its encoder may have `must_train_ids`: tokens that must be among
    the trained ones.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> str: ...

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]: ...

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> BoundTask: ...


def build_examples(
    spec: ExampleSpec,
    definition: ExampleDefinition,
    cache_dir: str | Path,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    reader: ReadRecords | None = None,
) -> ExampleDataset:
    """The examples that a task makes of records: opened at once if they are in `cache_dir`, built there otherwise.

    Args:
        out: build in this folder instead.
        workers: processes that encode; None is the cores this process may use. The result does not depend on it.
        reader: reads the records of a source; None reads every format that `data.records` knows.

    Raises:
        DataError: records are missing or malformed, too many give no example, or the disk is full.
        ConfigError: rows cannot be packed as asked.
    """
    corpus = list_corpus(_listing(spec, definition.shape))
    tokenizer = given_tokenizer(spec.tokenizer)
    key = example_key(spec, definition, corpus, tokenizer)
    name = re.sub(r"[^\w.-]+", "-", Path(spec.train[0].label).stem).strip("-.")[:40] or "data"
    stem = Path(out) if out is not None else Path(cache_dir) / f"{name}-{key[:12]}"
    folder = _find(spec, definition, key, stem, exact=out is not None)
    if folder is None:
        with building(stem):
            # another process may have built it while this one waited
            folder = _find(spec, definition, key, stem, exact=out is not None)
            if folder is None:
                folder = _build(
                    spec, definition, corpus, tokenizer, key, stem, out is not None, workers, progress, reader
                )
    dataset = ExampleDataset.open(folder, pad_multiple=spec.pad_multiple, static=spec.static)
    check_bounds(dataset.manifest, spec.max_drop, spec.max_cut)
    return dataset


def _listing(spec: ExampleSpec, shape: str) -> BuildSpec:
    """Every file of a build as the builder of running text lists them: training, then validation and test."""
    held_out = (*(spec.validation.sources if spec.validation else ()), *spec.test)
    return BuildSpec(
        tuple(one for source in spec.train for one in sides(source, shape)),
        TrainTokenizer(),
        validation=ValidationSpec(sources=tuple(one for source in held_out for one in sides(source, shape)))
        if held_out
        else None,
        on_error=spec.on_error,
    )


def sides(source: SourceSpec, shape: str) -> tuple[SourceSpec, ...]:
    """A source, or the two that `corpus.{de,en}` stands for."""
    if shape != "pair" or "{" not in source.source:
        return (source,)
    from trainwright.data.records.parallel import is_parallel, parallel_sources

    return parallel_sources(source) if is_parallel(source) else (source,)


def special_tokens(definition: ExampleDefinition) -> tuple[str, ...]:
    """Tokens that a trained tokenizer must have for a task; most tasks name none."""
    return tuple(getattr(definition, "special_tokens", ()))


def prepared(definition: ExampleDefinition, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as a task wants it kept; most tasks take it as it is."""
    prepare = getattr(definition, "prepare_tokenizer", None)
    found: Tokenizer = tokenizer if prepare is None else prepare(tokenizer)
    return found


def example_key(spec: ExampleSpec, definition: ExampleDefinition, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    """Hash of all that the bytes depend on beside the task's options: files, how they are read and split, tokenizer,
    rows."""
    sources = [source.facts() for source in corpus.sources]
    for facts in sources:
        facts.pop("source")
    training = spec.tokenizer if isinstance(spec.tokenizer, TrainTokenizer) else None
    what = {
        "schema": SCHEMA,
        "sources": sources,
        "roles": [len(spec.train), len(spec.validation.sources) if spec.validation else 0, len(spec.test)],
        "fraction": spec.fraction,
        **({"fold": list(spec.fold)} if spec.fold is not None else {}),
        "weighted": spec.weighted,
        "reading": [definition.shape, spec.format, sorted(spec.columns.items()), dict(spec.reading), spec.on_error],
        "task": definition.name,
        "tokenizer": tokenizer.fingerprint if tokenizer else [repr(training), special_tokens(definition)],
        "template": [tokenizer.chat_template if tokenizer else None, getattr(definition, "template", None)],
        "rows": [spec.sequence_length, spec.packing],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _find(spec: ExampleSpec, definition: ExampleDefinition, key: str, stem: Path, *, exact: bool) -> Path | None:
    """A complete folder of this key whose arrays this task would make again."""
    if exact:
        if not stem.exists() or (stem.is_dir() and not any(stem.iterdir())):
            return None
        if not is_examples(stem) or read_example_manifest(stem).key != key:
            raise _occupied(stem)
        candidates = [stem]
    else:
        candidates = [path for path in sorted(stem.parent.glob(f"{stem.name}-*")) if path.is_dir()]
    known = [(folder, manifest) for folder in candidates if (manifest := read_example_manifest(folder)).key == key]
    for folder, manifest in known:
        if spec.task and manifest.task == spec.task and _same_arrays(folder, manifest, definition, surveyed=False):
            return folder
    for folder, manifest in known:
        if _same_arrays(folder, manifest, definition, surveyed=True):
            return folder
    if exact:
        raise _occupied(stem)
    return None


def _same_arrays(folder: Path, manifest: ExampleManifest, definition: ExampleDefinition, *, surveyed: bool) -> bool:
    """Whether the task would make the arrays of a folder again; `surveyed` looks at its training records anew."""
    dataset = ExampleDataset(folder, manifest)
    if surveyed and as_json(definition.survey(iter(dataset.records_of("train")))) != dataset.survey:
        return False
    return definition.bind(dataset.survey, dataset.tokenizer()).encoder.fingerprint == manifest.encoder


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a file: tuples as lists, keys as texts."""
    found: dict[str, Any] = json.loads(json.dumps(value, ensure_ascii=False))
    return found


def _occupied(folder: Path) -> DataError:
    return DataError(
        f"{folder} holds something else", hint="give another folder, or delete this one if it is no longer needed"
    )


def _build(
    spec: ExampleSpec,
    definition: ExampleDefinition,
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    key: str,
    stem: Path,
    exact: bool,
    workers: int | None,
    progress: Progress | None,
    reader: ReadRecords | None,
) -> Path:
    from trainwright.data.examples.builder import Builder

    if reader is None:
        from trainwright.data.records.reading import read_records

        reader = read_records
    partial = stem.parent / f".{stem.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        builder = Builder(spec, definition, corpus, tokenizer, key, partial, reader, workers, progress)
        manifest = builder.run()
        mark = json.dumps([manifest.task, manifest.encoder, builder.survey], sort_keys=True, ensure_ascii=False)
        suffix = hashlib.sha256(mark.encode()).hexdigest()[:8]
        folder = stem if exact else stem.with_name(f"{stem.name}-{suffix}")
        fault_point("examples.before_rename")
        os.rename(partial, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the examples cannot be written to {stem.parent}: {error.strerror or error}; "
            f"{shutil.disk_usage(stem.parent).free / 2**20:.0f} MiB are free",
            hint="free some room, or choose another disk (data.cache, or the folder of `data build`)",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
