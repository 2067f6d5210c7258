"""From a BuildSpec to a stream of texts, each marked with its split: always the same stream, from any point of it.

The stream is made of *segments*: a document, the training or validation part of one, or, where a document is longer
than SEGMENT_CHARACTERS, a stretch of it cut where the tokenizer gives the same ids with and without the cut. A
segment's cursor (source, shard, number within the shard) is where a killed build goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from trainwright.base.errors import DataError
from trainwright.data.documents import Document, Problems, Shard, SourceSpec, split_of
from trainwright.data.readers import list_shards, read_shard
from trainwright.data.spec import BuildSpec

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "CorpusSource",
    "Segment",
    "check_unchanged",
    "decide_splits",
    "held_out_fraction",
    "list_corpus",
    "read_segments",
    "training_texts",
]

# A document beyond this many characters is tokenized in stretches: workers share it, and memory stays bounded.
SEGMENT_CHARACTERS = 1 << 19
_CUT_WINDOW = 256  # characters on each side of a cut in which the ids are compared
_CUT_TRIES = 64
# Fewer documents than this and a hash of keys is a lottery: the tail of each document is held out instead.
FEWEST_TO_HASH = 20
_LOOK_AHEAD = 200  # documents looked at to see that neither split of a small source stays empty
# `validation: auto` holds out 5 % but about 16 MB at most: more text makes the loss estimate no better.
AUTO_FRACTION = 0.05
AUTO_BYTES = 16 << 20
AUTO_SMALLEST = 0.0005
# Local files are hashed for the cache key up to this total (a tenth of a second); beyond it size and time must do.
HASH_BYTES = 1 << 30
SPLIT_SEED = 0


@dataclass(frozen=True)
class CorpusSource:
    """One source with its files. `rule`: train, validation (whole source), hash, tail, or "" while undecided."""

    spec: SourceSpec
    shards: tuple[Shard, ...]
    marks: tuple[str, ...]
    """What each shard is recognised by: content hash, or size and time, or the address alone."""
    rule: str
    fraction: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(shard.size or 0 for shard in self.shards)

    def facts(self) -> dict[str, Any]:
        """JSON values for the key and the manifest."""
        return {
            "name": self.spec.label,
            "source": self.spec.source,
            "text_field": self.spec.text_field,
            "weight": self.spec.weight,
            "split": self.rule,
            "fraction": self.fraction,
            "shards": [
                {"key": shard.key, "format": shard.format, "size": shard.size, "mark": mark}
                for shard, mark in zip(self.shards, self.marks, strict=True)
            ],
        }


@dataclass(frozen=True)
class Corpus:
    """Every source of a build, training sources first."""

    sources: tuple[CorpusSource, ...]
    on_error: Any

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    @property
    def shards(self) -> int:
        return sum(len(source.shards) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text for the tokenizer. `first` and `last` say whether it begins and ends a document."""

    text: str
    split: str
    first: bool
    last: bool
    source: int
    shard: int
    number: int
    """How many segments of the shard came before this one."""
    problems: Problems
    """Problems of the shards before this one: what a build that goes on from here has already counted."""


def list_corpus(spec: BuildSpec) -> Corpus:
    """Find the files of every source. Reads no document; hashes local files while they are few."""
    listed = [(source, list_shards(source)) for source in spec.sources]
    held_out = [(source, list_shards(source)) for source in (spec.validation.sources if spec.validation else ())]
    total = sum(shard.size or 0 for _, shards in listed + held_out for shard in shards)
    fraction = held_out_fraction(spec, sum(shard.size or 0 for _, shards in listed for shard in shards))
    sources = [
        CorpusSource(source, tuple(shards), _marks(shards, total <= HASH_BYTES), "" if fraction else "train", fraction)
        for source, shards in listed
    ]
    sources += [
        CorpusSource(source, tuple(shards), _marks(shards, total <= HASH_BYTES), "validation")
        for source, shards in held_out
    ]
    return Corpus(tuple(sources), spec.on_error)


def held_out_fraction(spec: BuildSpec, total: int) -> float:
    """The share of the training sources, `total` bytes as stored, that validation takes; 0 for none."""
    if spec.validation is None or spec.validation.sources:
        return 0.0
    if spec.validation.fraction is not None:
        return spec.validation.fraction
    return max(AUTO_SMALLEST, min(AUTO_FRACTION, AUTO_BYTES / max(total, 1)))


def _marks(shards: list[Shard], by_content: bool) -> tuple[str, ...]:
    return tuple(_mark(shard, by_content) for shard in shards)


def _mark(shard: Shard, by_content: bool) -> str:
    path = Path(shard.url)
    if "://" in shard.url or not path.is_file():
        return f"{shard.url} {shard.size} {shard.modified}"
    if not by_content:
        return f"{shard.size} {shard.modified}"
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def decide_splits(corpus: Corpus) -> Corpus:
    """Choose between `hash` and `tail` for every source that gives a fraction away, from its first documents."""
    return replace(corpus, sources=tuple(_decide(corpus, source) for source in corpus.sources))


def _decide(corpus: Corpus, source: CorpusSource) -> CorpusSource:
    if source.rule:
        return source
    every = (key for shard in source.shards for key in _keys(source, shard))
    keys = list(itertools.islice(every, _LOOK_AHEAD))
    splits = {split_of(key, source.fraction, SPLIT_SEED) for key in keys}
    small = len(keys) < FEWEST_TO_HASH or (len(keys) < _LOOK_AHEAD and len(splits) < 2)
    return replace(source, rule="tail" if small else "hash")


def _keys(source: CorpusSource, shard: Shard) -> Iterator[str]:
    """The keys of the documents of a shard; a text file is one document, whose key needs no reading."""
    if shard.format == "text":
        yield from [shard.key] if shard.size else []
    else:
        # problems met here are met again, and reported, when the corpus is read
        yield from (document.key for document in _documents(source, shard, "skip", Problems()))


def _documents(source: CorpusSource, shard: Shard, on_error: Any, problems: Problems) -> Iterator[Document]:
    return read_shard(shard, text_field=source.spec.text_field, on_error=on_error, problems=problems)


def _parts(source: CorpusSource, document: Document) -> list[tuple[str, str]]:
    """The text of a document by split: all of it in one, or its head in train and its tail in validation."""
    match source.rule:
        case "hash":
            return [(split_of(document.key, source.fraction, SPLIT_SEED), document.text)]
        case "tail":
            cut = int(len(document.text) * (1 - source.fraction))
            parts = [("train", document.text[:cut]), ("validation", document.text[cut:])]
            return [(split, text) for split, text in parts if text]
    return [(source.rule, document.text)]


def training_texts(corpus: Corpus, budget: int | None) -> Iterator[str]:
    """Text of the training split for a tokenizer to learn from: about `budget` characters, spread over all shards.

    Every shard may give an equal share of what is left, so the sample depends on nothing but the corpus. None: all.
    """
    shards = [(source, shard) for source in corpus.sources if source.rule != "validation" for shard in source.shards]
    left = budget
    for number, (source, shard) in enumerate(shards):
        allowance = None if left is None else left // (len(shards) - number)
        taken = 0
        for document in _documents(source, shard, corpus.on_error, Problems()):
            for split, text in _parts(source, document):
                if split != "train":
                    continue
                piece = text if allowance is None else text[: allowance - taken]
                taken += len(piece)
                yield piece
            if allowance is not None and taken >= allowance:
                break
        if left is not None:
            left -= taken


def read_segments(
    corpus: Corpus, tokenizer: Tokenizer, *, start: tuple[int, int, int] = (0, 0, 0), problems: Problems | None = None
) -> Iterator[Segment]:
    """All segments from the cursor `start` on; `problems` are those already counted before its shard.

    After the last segment, `problems` holds everything that was found.
    """
    before = problems if problems is not None else Problems()
    for s, source in enumerate(corpus.sources):
        for h, shard in enumerate(source.shards):
            if (s, h) < start[:2]:
                continue
            skip = start[2] if (s, h) == start[:2] else 0
            snapshot = Problems.from_dict(before.to_dict())
            found = Problems()
            number = 0
            for document in _documents(source, shard, corpus.on_error, found):
                for split, text in _parts(source, document):
                    stretches = list(_stretches(text, tokenizer))
                    for i, stretch in enumerate(stretches):
                        if number >= skip:
                            last = i == len(stretches) - 1
                            yield Segment(stretch, split, i == 0, last, s, h, number, snapshot)
                        number += 1
            before.merge(found)


def _stretches(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The text, cut into stretches of about SEGMENT_CHARACTERS whose ids, joined, are those of the whole text."""
    begin = 0
    while len(text) - begin > 2 * SEGMENT_CHARACTERS:
        cut = _safe_cut(text, begin + SEGMENT_CHARACTERS, tokenizer)
        if cut is None:
            break
        yield text[begin:cut]
        begin = cut
    yield text[begin:] if begin else text


def _safe_cut(text: str, near: int, tokenizer: Tokenizer) -> int | None:
    """A line start at or after `near` where cutting changes no token; None when the next ones all would.

    Sentencepiece-style tokenizers mark the start of a text, so they change at every cut and take documents whole.
    """
    cut = near
    for _ in range(_CUT_TRIES):
        cut = text.find("\n", cut) + 1
        if cut == 0 or len(text) - cut < _CUT_WINDOW:
            return None
        if text[cut].isspace():
            continue
        left, right = text[cut - _CUT_WINDOW : cut], text[cut : cut + _CUT_WINDOW]
        both, begin, end = (tokenizer.encode(part, parse_special=False) for part in (left + right, left, right))
        if both == begin + end:
            return cut
    return None


def check_unchanged(corpus: Corpus) -> None:
    """Raise DataError when a file is not what it was when the build began: its tokens would be of two versions."""
    for source in corpus.sources:
        if source.spec.source.startswith("hf://"):
            continue
        if tuple(list_shards(source.spec)) != source.shards:
            raise DataError(
                f"{source.spec.label}: its files changed while they were read",
                hint="build again when they are complete",
            )
