"""One build of running text: from a hidden folder, with what a killed build left, to a complete one that only needs a
name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.base.errors import ConfigError
from trainwright.data.chosen_tokenizer import trained_tokenizer
from trainwright.data.corpus import Corpus, Segment, check_unchanged, decide_splits, read_segments, training_texts
from trainwright.data.encoding import Framing, encode_all
from trainwright.data.finish import finish_dataset
from trainwright.data.manifest import Manifest
from trainwright.data.spec import BuildSpec, TrainTokenizer, default_workers
from trainwright.data.writing import TokenWriter

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["BuildProgress", "Builder", "Progress"]

BATCH_CHARACTERS = 1 << 19  # what a worker gets at a time: about 0.2 s of work, so that the last ones end together
BATCH_SEGMENTS = 4096
# Below this much text, starting processes costs more than it saves.
FEWEST_BYTES_PER_WORKER = 4 << 20


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is. `phase` is "tokenizer", "tokens" or "rows"; bytes are of the source files as stored."""

    phase: str
    bytes_done: int
    bytes_total: int
    tokens: int
    documents: int
    seconds: float


Progress = Callable[[BuildProgress], None]


class Builder:
    """Use `run` once, under the lock of the target."""

    def __init__(
        self,
        spec: BuildSpec,
        corpus: Corpus,
        tokenizer: Tokenizer | None,
        key: str,
        folder: Path,
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        self.spec = spec
        self.corpus = corpus
        self.given = tokenizer
        self.key = key
        self.partial = folder
        wanted = default_workers() if workers is None else workers
        if wanted < 1:
            raise ConfigError(f"workers is {wanted}; expected at least 1")
        self.workers = max(1, min(wanted, corpus.bytes // FEWEST_BYTES_PER_WORKER))
        self.progress = progress
        self.began = time.monotonic()
        sizes = [[shard.size or 0 for shard in source.shards] for source in corpus.sources]
        self._bytes_before = {
            (s, h): sum(map(sum, sizes[:s])) + sum(sizes[s][:h])
            for s in range(len(sizes))
            for h in range(len(sizes[s]))
        }

    def run(self) -> Manifest:
        self._start_folder()
        self.corpus = decide_splits(self.corpus)
        tokenizer = self._tokenizer()
        framing = self._framing(tokenizer)
        writer = TokenWriter(self.partial, self.key, tokenizer.fingerprint, len(self.corpus.sources), framing.dtype)
        try:
            self._tokenize(tokenizer, framing, writer)
            writer.finish()
        finally:
            writer.close()
        self._report("rows", self.corpus.bytes, writer)
        check_unchanged(self.corpus)
        return finish_dataset(self.partial, self.spec, self.corpus, self.key, tokenizer, framing, writer.state)

    def _start_folder(self) -> None:
        """Keep the work of a killed build of the same key; throw away any other."""
        mark = self.partial / "key"
        if self.partial.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != self.key):
            shutil.rmtree(self.partial)
        self.partial.mkdir(exist_ok=True)
        mark.write_text(self.key, encoding="utf-8")

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, saved in the dataset's folder: given, trained now, or trained by the build that was killed."""
        from trainwright.data.tokenizers import load_tokenizer

        folder = self.partial / "tokenizer"
        if folder.exists():
            return load_tokenizer(str(folder))
        tokenizer = self.given
        if tokenizer is None:
            assert isinstance(self.spec.tokenizer, TrainTokenizer)
            self._report("tokenizer", 0, None)
            tokenizer = trained_tokenizer(self.spec.tokenizer, partial(training_texts, self.corpus))
        scratch = self.partial / "tokenizer.new"
        shutil.rmtree(scratch, ignore_errors=True)
        tokenizer.save(scratch)
        os.rename(scratch, folder)
        return tokenizer

    def _framing(self, tokenizer: Tokenizer) -> Framing:
        if self.spec.append_eos and tokenizer.eos_id is None:
            raise ConfigError(
                "append_eos is true, but the tokenizer has no end-of-text token",
                hint="set data.append_eos: false, or take a tokenizer that has one",
            )
        if self.spec.prepend_bos and tokenizer.bos_id is None:
            raise ConfigError("prepend_bos is true, but the tokenizer has no begin-of-text token")
        characters = isinstance(self.spec.tokenizer, TrainTokenizer) and self.spec.tokenizer.kind == "char"
        ends = not characters if self.spec.append_eos is None else self.spec.append_eos
        return Framing(
            bos=tokenizer.bos_id if self.spec.prepend_bos else None,
            eos=tokenizer.eos_id if ends else None,
            unknown=tokenizer.unk_id,
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        )

    def _tokenize(self, tokenizer: Tokenizer, framing: Framing, writer: TokenWriter) -> None:
        """Read, tokenize and write in a pipeline; memory is bounded by the batches in flight."""
        state = writer.state
        found = state.problems.from_dict(state.problems.to_dict())
        segments = read_segments(self.corpus, tokenizer, start=state.cursor, problems=found)
        folder = self.partial / "tokenizer"
        with closing(encode_all(tokenizer, folder, framing, _batches(segments), self.workers)) as encoded:
            for batch, tokens in encoded:
                writer.write(batch, tokens)
                self._report("tokens", self._bytes_before[batch[-1].source, batch[-1].shard], writer)
        state.problems = found
        state.cursor = (len(self.corpus.sources), 0, 0)

    def _report(self, phase: str, done: int, writer: TokenWriter | None) -> None:
        if self.progress is None:
            return
        counts = [one for sources in writer.state.counts.values() for one in sources] if writer else []
        within = 0
        if writer and phase == "tokens":  # the part of the current shard, by the bytes of text already tokenized
            within = max(0, min(sum(one.bytes for one in counts), self.corpus.bytes) - done)
        self.progress(
            BuildProgress(
                phase,
                done + within,
                self.corpus.bytes,
                sum(one.tokens for one in counts),
                sum(one.documents for one in counts),
                time.monotonic() - self.began,
            )
        )


def _batches(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    characters = 0
    for segment in segments:
        batch.append(segment)
        characters += len(segment.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_SEGMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
