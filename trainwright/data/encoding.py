"""Batches of text to arrays of tokens, in this process or in several; the result does not depend on how many."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.data.corpus import Segment
from trainwright.data.worker_pool import WorkerPool

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["Encoded", "Framing", "encode", "encode_all"]

FIRST, LAST = 1, 2


@dataclass(frozen=True)
class Framing:
    """Ids that begin and end each document (None: nothing), the id of unknown text, and the type of tokens on disk."""

    bos: int | None
    eos: int | None
    unknown: int | None
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch: all `tokens` in one array, `lengths` per segment, and how many are the unknown token."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    unknown: NDArray[np.int64]
    """Unknown tokens per segment."""
    bytes: NDArray[np.int64]
    """UTF-8 bytes of the text per segment."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], flags: Sequence[int], framing: Framing) -> Encoded:
    """Tokenize texts; `flags` say which begin (FIRST) and end (LAST) a document and so get bos and eos."""
    # parse_special=False: a document that spells a special token holds its characters, not its meaning
    ids = tokenizer.encode_batch(list(texts), parse_special=False)
    if framing.bos is not None:
        ids = [[framing.bos, *one] if flag & FIRST else one for one, flag in zip(ids, flags, strict=True)]
    if framing.eos is not None:
        ids = [[*one, framing.eos] if flag & LAST else one for one, flag in zip(ids, flags, strict=True)]
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    # fromiter straight into 16 bits: 25 ns a token against 45 through an intermediate list
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=framing.dtype, count=int(lengths.sum()))
    unknown = np.zeros(len(ids), dtype=np.int64)
    if framing.unknown is not None:
        owner = np.repeat(np.arange(len(ids)), lengths)
        unknown = np.bincount(owner[tokens == framing.unknown], minlength=len(ids)).astype(np.int64)
    sizes = np.fromiter((len(text.encode("utf-8")) for text in texts), dtype=np.int64, count=len(texts))
    return Encoded(tokens, lengths, unknown, sizes)


def encode_all(
    tokenizer: Tokenizer, folder: Path, framing: Framing, batches: Iterable[Sequence[Segment]], workers: int
) -> Generator[tuple[Sequence[Segment], Encoded], None, None]:
    """Batches and their tokens, in order, each as soon as it and those before it are tokenized.

    Args:
        tokenizer: what encodes in this process.
        folder: where the same tokenizer is saved, for other processes to load.
        workers: processes that tokenize; 1 is this one.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encode(tokenizer, *_texts_and_flags(batch), framing)
        return
    job = _Tokenizing(str(folder), tokenizer.fingerprint, framing)
    with WorkerPool(job, workers, "a tokenizing process") as pool:
        yield from pool.map(batches, _texts_and_flags)


def _texts_and_flags(batch: Sequence[Segment]) -> tuple[list[str], list[int]]:
    return [segment.text for segment in batch], [FIRST * segment.first | LAST * segment.last for segment in batch]


@dataclass
class _Tokenizing:
    """The job of a worker: loads the tokenizer with the first batch."""

    folder: str
    fingerprint: str
    framing: Framing
    tokenizer: Tokenizer | None = field(default=None, init=False)

    def __call__(self, batch: tuple[list[str], list[int]]) -> Encoded:
        from trainwright.data.tokenizers import load_tokenizer

        try:
            if self.tokenizer is None:
                self.tokenizer = load_tokenizer(self.folder)
            if self.tokenizer.fingerprint != self.fingerprint:
                raise DataError(f"the tokenizer in {self.folder} changed while it was in use")
            return encode(self.tokenizer, *batch, self.framing)
        except Exception as error:
            raise DataError(f"tokenizing failed: {type(error).__name__}: {error}") from error
