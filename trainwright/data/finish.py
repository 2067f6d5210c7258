"""The last steps of a build: rows from document lengths, checks of what came out, block hashes, the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.base.events import emit
from trainwright.data.corpus import Corpus
from trainwright.data.dataset import split_files
from trainwright.data.encoding import Framing
from trainwright.data.manifest import MANIFEST_NAME, Manifest, SplitFacts
from trainwright.data.mixture import RowGroup
from trainwright.data.packing import concat_rows, pack
from trainwright.data.spec import BuildSpec
from trainwright.data.storage import fsync_folder, hash_file, write_array, write_bytes
from trainwright.data.writing import STATE_NAME, BuildState, Counts

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["finish_dataset"]

UNKNOWN_WARNING = 0.01  # a tokenizer that does not know one token in a hundred was made for other text


def finish_dataset(
    folder: Path,
    spec: BuildSpec,
    corpus: Corpus,
    key: str,
    tokenizer: Tokenizer,
    framing: Framing,
    state: BuildState,
) -> Manifest:
    """Complete a folder of token files; it only needs its final name afterwards."""
    splits = {"train": _finish_split(folder, "train", spec, corpus, state)}
    if not splits["train"].tokens:
        raise DataError(
            f"the corpus is empty: {_seen(corpus, state)}",
            hint="check data.source and data.text_field; with data.on_error: skip, see what was skipped above",
        )
    if spec.validation is not None:
        splits["validation"] = _finish_split(folder, "validation", spec, corpus, state)
    else:
        for name in ("tokens-validation.bin", "docs-validation.idx"):
            (folder / name).unlink()
    _check_sizes(spec, splits)
    notes = _notes(splits)
    for note in notes:
        emit("warning", message=note)
    for name in ("key", STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    manifest = Manifest(
        key=key,
        token_dtype=framing.dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=next((one for one in (tokenizer.pad_id, tokenizer.eos_id) if one is not None), 0),
        sequence_length=spec.sequence_length,
        packing=spec.packing,
        document_mask=spec.masked,
        append_eos=framing.eos is not None,
        prepend_bos=framing.bos is not None,
        splits=splits,
        sources=[_source_facts(corpus, state, number) for number in range(len(corpus.sources))],
        problems=dict(sorted(state.problems.counts.items())),
        problem_examples=list(state.problems.examples),
        files={
            path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
        notes=notes,
    )
    write_bytes(folder / MANIFEST_NAME, manifest.to_json().encode("utf-8"))
    fsync_folder(folder / "tokenizer")
    fsync_folder(folder)
    return manifest


def _finish_split(folder: Path, split: str, spec: BuildSpec, corpus: Corpus, state: BuildState) -> SplitFacts:
    offsets = np.fromfile(folder / f"docs-{split}.idx", dtype="<u8").astype(np.int64)
    groups = _groups(split, spec, corpus, state.counts[split])
    row_groups: list[RowGroup] = []
    tables = []
    first_row = inputs = trained = split_documents = dropped = document = 0
    for name, weight, counts in groups:
        mine = offsets[document : document + counts.documents + 1]
        document += counts.documents
        if spec.packing == "concat":
            facts = _concat_facts(mine, counts.tokens, spec)
        else:
            table = pack(mine, spec.sequence_length, spec.packing, document_mask=spec.masked)
            tables.append(table)
            # a label for every input, but for the last token of a document where that takes a slot
            ends = np.isin(table.start + table.inputs, mine[1:]).sum() if not spec.masked else 0
            facts = (
                table.rows,
                int(table.inputs.sum()),
                int(table.inputs.sum() - ends),
                table.split_documents,
                table.dropped_documents,
            )
        row_groups.append(RowGroup(name, first_row, facts[0], weight))
        first_row += facts[0]
        inputs += facts[1]
        trained += facts[2]
        split_documents += facts[3]
        dropped += facts[4]
    if spec.packing != "concat":
        names = split_files(split, packed=True)
        counts_before = np.cumsum([0] + [len(table.start) for table in tables[:-1]])
        row_offsets = [table.row_offsets[:-1] + before for table, before in zip(tables, counts_before, strict=True)]
        row_offsets.append(np.asarray([sum(len(table.start) for table in tables)]))
        write_array(folder / names["row_offsets"][0], np.concatenate(row_offsets).astype("<u8"))
        write_array(folder / names["piece_start"][0], np.concatenate([t.start for t in tables]).astype("<u8"))
        write_array(folder / names["piece_inputs"][0], np.concatenate([t.inputs for t in tables]).astype("<u4"))
    total = _sum(state.counts[split])
    return SplitFacts(
        documents=total.documents,
        tokens=total.tokens,
        characters=total.characters,
        bytes=total.bytes,
        unknown_tokens=total.unknown,
        rows=first_row,
        inputs=inputs,
        trained_tokens=trained,
        split_documents=split_documents,
        dropped_documents=dropped,
        groups=tuple(row_groups),
        group_tokens=tuple(counts.tokens for _, _, counts in groups),
    )


def _groups(
    split: str, spec: BuildSpec, corpus: Corpus, counts: list[Counts]
) -> list[tuple[str, float | None, Counts]]:
    """The sources that are drawn separately: each one of a weighted mixture; else all as one."""
    if spec.weighted and split == "train":
        found: list[tuple[str, float | None, Counts]] = [
            (source.spec.label, source.spec.weight, one)
            for source, one in zip(corpus.sources, counts, strict=True)
            if source.rule != "validation"
        ]
        empty = [name for name, _, one in found if one.tokens < 2]
        if empty:
            raise DataError(f"no training text in {', '.join(empty)}, which the mixture draws from")
        return found
    return [("all", None, _sum(counts))]


def _sum(counts: list[Counts]) -> Counts:
    return Counts(
        sum(one.documents for one in counts),
        sum(one.tokens for one in counts),
        sum(one.characters for one in counts),
        sum(one.bytes for one in counts),
        sum(one.unknown for one in counts),
    )


def _concat_facts(offsets: NDArray[np.int64], tokens: int, spec: BuildSpec) -> tuple[int, int, int, int, int]:
    """(rows, inputs, trained tokens, split documents, dropped documents) of one stream."""
    length = spec.sequence_length
    rows = concat_rows(tokens, length)
    lengths = np.diff(offsets)
    begin, end = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    crosses = (lengths > 0) & (begin // length != (end - 1) // length)
    inputs = max(0, tokens - 1)
    # with a mask the first token of a document is nobody's label; the stream's very first never was
    inner = np.unique(begin[(begin > 0) & (begin < tokens)]).size if spec.masked else 0
    return rows, inputs, inputs - inner, int(crosses.sum()), 0


def _check_sizes(spec: BuildSpec, splits: dict[str, SplitFacts]) -> None:
    train = splits["train"]
    if train.trained_tokens == 0:
        raise DataError(f"the training split has {train.tokens} tokens and nothing to predict", hint="add text")
    if spec.packing == "concat" and train.tokens <= spec.sequence_length:
        raise DataError(
            f"the training split has {train.tokens} tokens, fewer than one row of {spec.sequence_length} and its label",
            hint="add text, or lower data.sequence_length",
        )
    if "validation" in splits and splits["validation"].trained_tokens == 0:
        held = splits["validation"]
        raise DataError(
            f"the validation split is empty: {held.documents} documents with {held.tokens} tokens were held out",
            hint="raise data.validation.fraction, name another source to validate on, or set data.validation: none",
        )


def _notes(splits: dict[str, SplitFacts]) -> list[str]:
    notes = []
    for name, facts in splits.items():
        share = facts.unknown_tokens / max(facts.tokens, 1)
        if share > UNKNOWN_WARNING:
            notes.append(
                f"{share:.1%} of the {name} tokens are the tokenizer's unknown token: it was made for other text; "
                "train one on this text (data.tokenizer: {train: bpe}) or choose another"
            )
    return notes


def _source_facts(corpus: Corpus, state: BuildState, number: int) -> dict[str, object]:
    counts = {split: vars(state.counts[split][number]) for split in state.counts}
    return {**corpus.sources[number].facts(), "counts": {split: dict(one) for split, one in counts.items()}}


def _seen(corpus: Corpus, state: BuildState) -> str:
    names = ", ".join(source.spec.label for source in corpus.sources)
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(state.problems.counts.items()))
    return f"no tokens in {corpus.shards} files of {names}" + (f" (skipped: {skipped})" if skipped else "")
