"""`data build`: texts in, a dataset folder out. Parallel, resumable, atomic, and the same bytes however it was made.

    list files -> key -> (exists? done) -> splits -> tokenizer -> tokens -> rows -> hashes -> manifest -> rename

Everything is written to a hidden folder beside the target, which is renamed when it is complete and durable. The key
names everything that the bytes depend on, so a second build of the same thing opens the first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.base.errors import DataError
from trainwright.base.faults import fault_point
from trainwright.data.builder import Builder, Progress
from trainwright.data.chosen_tokenizer import given_tokenizer
from trainwright.data.corpus import Corpus, list_corpus
from trainwright.data.dataset import TokenDataset
from trainwright.data.exclusive import building
from trainwright.data.manifest import SCHEMA, Manifest, read_manifest
from trainwright.data.spec import BuildSpec, TrainTokenizer
from trainwright.data.storage import fsync_folder

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["build_dataset", "dataset_key", "prepare_dataset"]


def prepare_dataset(
    spec: BuildSpec, cache_dir: str | Path, workers: int | None = None, progress: Progress | None = None
) -> TokenDataset:
    """The dataset of `spec`: opened at once if `cache_dir` holds it, built there otherwise."""
    corpus = list_corpus(spec)
    tokenizer = given_tokenizer(spec.tokenizer)
    key = dataset_key(spec, corpus, tokenizer)
    name = re.sub(r"[^\w.-]+", "-", Path(spec.sources[0].label).stem).strip("-.")[:40] or "data"
    folder = Path(cache_dir) / f"{name}-{key[:16]}"
    _build(spec, corpus, tokenizer, key, folder, workers, progress)
    return TokenDataset.open(folder)


def build_dataset(
    spec: BuildSpec, out_dir: str | Path, workers: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Build the dataset of `spec` in `out_dir`; returns at once when it is there already.

    Args:
        workers: processes that tokenize; None is the cores this process may use. The result does not depend on it.

    Raises:
        DataError: the text is missing, empty or malformed, `out_dir` holds something else, or the disk is full.
    """
    corpus = list_corpus(spec)
    tokenizer = given_tokenizer(spec.tokenizer)
    return _build(spec, corpus, tokenizer, dataset_key(spec, corpus, tokenizer), Path(out_dir), workers, progress)


def dataset_key(spec: BuildSpec, corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    """Hash of everything the bytes of a dataset depend on: contents and names of files, tokenizer, row settings."""
    sources = [source.facts() for source in corpus.sources]
    for facts in sources:
        facts.pop("source")
    training = spec.tokenizer if isinstance(spec.tokenizer, TrainTokenizer) else None
    what = {
        "schema": SCHEMA,
        "sources": sources,
        "weighted": spec.weighted,
        "tokenizer": tokenizer.fingerprint if tokenizer else repr(training),
        "rows": [spec.sequence_length, spec.packing, spec.masked],
        "framing": [spec.append_eos, spec.prepend_bos],
        "on_error": spec.on_error,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    spec: BuildSpec,
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    key: str,
    out_dir: Path,
    workers: int | None,
    progress: Progress | None,
) -> Manifest:
    if (found := _existing(out_dir, key)) is not None:
        return found
    with building(out_dir):
        if (found := _existing(out_dir, key)) is not None:  # another process built it while this one waited
            return found
        partial = out_dir.parent / f".{out_dir.name}.partial"
        try:
            manifest = Builder(spec, corpus, tokenizer, key, partial, workers, progress).run()
            fault_point("build.before_rename")
            os.rename(partial, out_dir)
            fsync_folder(out_dir.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _disk_full(corpus, partial) from error
    return manifest


def _existing(out_dir: Path, key: str) -> Manifest | None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    manifest = read_manifest(out_dir) if out_dir.is_dir() else None
    if manifest is None or manifest.key != key:
        raise DataError(
            f"{out_dir} holds something else: {'another dataset' if manifest else 'it is a file'}",
            hint="give another folder, or delete this one if it is no longer needed",
        )
    return manifest


def _disk_full(corpus: Corpus, partial: Path) -> DataError:
    """Remove what cannot be completed, and say how much room there is and would be needed."""
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(partial.parent).free
    # byte-level BPE gives a token for 3 to 4 bytes of text, 2 bytes each; characters a token a byte: 2 bytes for one
    return DataError(
        f"the disk is full: {partial.parent} had room for {written / 2**20:.1f} MiB of the dataset; what was written "
        f"is removed again, {free / 2**20:.1f} MiB are free now",
        hint=f"free about {max(2 * corpus.bytes, 2 * written) / 2**20:.0f} MiB (twice the text is always enough), or "
        "choose another disk (data.cache, or the folder of `data build`)",
    )
