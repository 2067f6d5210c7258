"""What built examples look like to a person: counts, and rows as text with the trained tokens marked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.errors import DataError
from trainwright.base.text import human_bytes, human_count
from trainwright.data.dataset import IGNORE
from trainwright.data.examples.checks import check_trainable, padding_share
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.manifest import ExampleFacts
from trainwright.data.marking import Run, legend, marked_lines, marked_runs, visible
from trainwright.data.mixture import RowOrder

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["describe_examples", "inspect_examples", "preview_examples"]

BATCH_ROWS = 32  # for the share of padding, while the batch of a run is not known
SHOWN = 5  # dropped records that are named


def inspect_examples(folder: str | Path, *, verify: bool = True) -> list[str]:
    """Describe a folder of examples; `verify` reads every byte and compares it with the manifest's hashes."""
    dataset = ExampleDataset.open(folder, verify="hashes" if verify else "sizes")
    size = sum(facts.bytes for facts in dataset.manifest.files.values())
    state = "every block matches its hash" if verify else "sizes match"
    return [
        f"{folder}: {len(dataset.manifest.files)} files, {human_bytes(size)}, {state}",
        *describe_examples(dataset),
    ]


def describe_examples(dataset: ExampleDataset) -> list[str]:
    """What a dataset of examples holds, in lines for a terminal."""
    manifest = dataset.manifest
    lines = [
        f"fingerprint   {dataset.fingerprint}",
        f"task          {manifest.definition}, records of the shape {manifest.shape}",
        f"tokenizer     {manifest.vocab_size:,} tokens, {manifest.tokenizer_fingerprint}",
        f"rows          up to {manifest.sequence_length} tokens, packing {manifest.packing}",
    ]
    for split in dataset.splits:
        lines += describe_split(dataset, split)
    for source in manifest.sources:
        lines.append(f"source        {source['name']}: {len(source['shards'])} files, for {source['split']}")
    return lines + [f"warning       {visible(note)}" for note in manifest.notes]


def describe_split(dataset: ExampleDataset, split: str) -> Iterator[str]:
    """The counts of a split."""
    facts = dataset.facts(split)
    blank = " " * 13
    rows = f"{facts.rows:,} rows of whole examples, " if facts.packed else ""
    yield (
        f"{split:<13} {facts.records:,} records, {facts.examples:,} examples, {rows}{facts.inputs:,} tokens "
        f"(the longest example has {facts.longest:,})"
    )
    trained = f"{blank} {facts.trained_tokens:,} trained labels"
    if _labels_of_tokens(dataset):
        trained += f" ({facts.trained_tokens / max(facts.inputs, 1):.1%} of the tokens)"
    if facts.untrained_examples:
        trained += f", {facts.untrained_examples:,} examples without any"
    if facts.rows:
        padding = padding_share(dataset, BATCH_ROWS, split)
        trained += f"; padding {padding:.1%} in batches of {min(BATCH_ROWS, facts.rows)} rows"
    yield trained
    yield (
        f"{blank} {facts.truncated:,} records cut"
        + (f" ({human_count(facts.cut_tokens)} tokens)" if facts.truncated else "")
        + f", {facts.dropped_records:,} dropped, {facts.skipped_records:,} unreadable, "
        f"{facts.unknown_tokens:,} unknown tokens"
    )
    yield from _left_out(facts)
    if facts.must_train:
        tokenizer = dataset.tokenizer()
        for one, count in facts.must_train.items():
            if not count and any(facts.must_train.values()):
                continue  # another token ends what these records write
            token = visible(str(tokenizer.token(int(one))))
            yield f"{blank} {token} ends what is written: trained {count:,} times"
    elif (end := _end_of_text(dataset, split)) is not None:
        yield f"{blank} {visible(end[0])} is trained {end[1]:,} times"
    if len(facts.groups) > 1:
        shares = RowOrder(facts.groups, seed=0).weights
        for group in facts.groups:
            yield f"{blank} {group.name}: {group.rows:,} rows, drawn {shares[group.name]:.2%} of the time"


def _left_out(facts: ExampleFacts) -> Iterator[str]:
    kinds = {**facts.dropped, **{f"unreadable: {k}": n for k, n in facts.skipped.items()}}
    kinds |= {f"mended: {k}": n for k, n in facts.repaired.items()}
    for reason, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
        yield f"{'':<13}   {count:,} {visible(reason)}"
    for line in [*facts.dropped_examples, *facts.skipped_examples][:SHOWN]:
        yield f"{'':<13}     {visible(line)}"


def _labels_of_tokens(dataset: ExampleDataset) -> bool:
    return next(feature.axis for feature in dataset.features if feature.name == "labels") == "tokens"


def _end_of_text(dataset: ExampleDataset, split: str) -> tuple[str, int] | None:
    """The tokenizer's end of text and how often it is trained, where labels are the tokens to come."""
    tokenizer = dataset.tokenizer()
    if tokenizer.eos_id is None or not dataset.rows(split):
        return None
    row = dataset.row(split, 0)
    if not (_is_next_token(row) or _is_target(row)):
        return None
    return str(tokenizer.token(tokenizer.eos_id)), dataset.count_labels(split, tokenizer.eos_id)


def _is_next_token(row: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the labels of a row say which token comes next."""
    labels, ids = row["labels"], row["input_ids"]
    if labels.shape != ids.shape or labels.dtype.kind == "f":
        return False
    inner = np.flatnonzero((labels[:-1] != IGNORE) & (np.arange(len(ids) - 1) + 1 < int(row["lengths"])))
    if "document_ids" in row:
        inner = inner[row["document_ids"][inner] == row["document_ids"][inner + 1]]
    # one trained label that stands last of all has no input behind it to be compared with
    return bool(np.all(labels[inner] == ids[inner + 1])) and bool((labels != IGNORE).any())


def _is_target(row: Mapping[str, NDArray[Any]]) -> bool:
    return "decoder_input_ids" in row and row["labels"].shape == row["decoder_input_ids"].shape


def preview_examples(
    folder: str | Path,
    *,
    rows: int = 3,
    split: str = "train",
    seed: int = 0,
    color: bool = False,
    width: int = 100,
    characters: int = 1200,
    names: Sequence[str] = (),
) -> list[str]:
    """The counts of a split, and the first rows that training would draw of it, as text.

    Args:
        color: trained text in green and context dim; False marks trained text with « ».
        width: cells of a line; Chinese characters take two.
        characters: how much of each example is shown.
        names: of labels that stand for classes, in order; labels are shown as numbers without.
    """
    dataset = ExampleDataset.open(folder)
    tokenizer = dataset.tokenizer()
    lines = [str(dataset.folder), *describe_split(dataset, split)]
    order = RowOrder(dataset.groups(split), seed)
    draws = np.arange(min(rows, order.rows), dtype=np.int64)
    drawn = list(zip(draws.tolist(), order(draws).tolist(), strict=True))
    if any(_is_next_token(dataset.row(split, row)) or _is_target(dataset.row(split, row)) for _, row in drawn):
        lines.append(legend(color))
    for draw, row in drawn:
        title = f"draw {draw}: row {row}"
        lines += _preview_row(dataset, split, row, tokenizer, title, color, width, characters, names)
    try:
        check_trainable(dataset, split)
    except DataError as error:
        lines += ["", f"training would refuse this: {error}"]
    return lines


def _preview_row(
    dataset: ExampleDataset,
    split: str,
    number: int,
    tokenizer: Tokenizer,
    title: str,
    color: bool,
    width: int,
    characters: int,
    names: Sequence[str],
) -> Iterator[str]:
    row = dataset.row(split, number)
    slots, used = len(row["input_ids"]), int(row["lengths"])
    pieces = _pieces(row)
    records = dataset.records(split, [number])
    yield ""
    yield (
        f"--- {title}: {len(pieces)} example{'s' * (len(pieces) != 1)}, {used} tokens"
        + (f" ({slots - used} padding)" if dataset.padding.static or len(pieces) > 1 else "")
        + f", {records[0]['where']}"
        + (" and others" if len(records) > 1 else "")
    )
    for start, stop in pieces:
        room = characters * (stop - start) // max(used, 1) + 80
        yield from marked_lines(_runs(row, start, stop, tokenizer), color, width, room)
    if _is_target(row):
        known = row["labels"] != IGNORE
        runs: list[Run] = [(tokenizer.decode(row["labels"][known].tolist(), skip_special=False), True)]
        yield "  ->"
        yield from marked_lines(runs, color, width, characters)
    elif not _is_next_token(row):
        yield f"  labels: {_shortened(row['labels'], used, names)}"
        yield from marked_lines([(_record_text(records[0]), False)], False, width, characters // 3)


def _pieces(row: Mapping[str, NDArray[Any]]) -> list[tuple[int, int]]:
    """The stretches of a row that are one example each, without padding."""
    used = int(row["lengths"])
    if "document_ids" not in row:
        return [(0, used)]
    ids = row["document_ids"][:used]
    return list(itertools.pairwise([0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), used]))


def _runs(row: Mapping[str, NDArray[Any]], start: int, stop: int, tokenizer: Tokenizer) -> list[Run]:
    """The text of an example in runs; a token is trained when it is the label of the slot before it."""
    ids = row["input_ids"][start:stop].tolist()
    if not _is_next_token(row):
        return marked_runs(tokenizer, ids, [False] * len(ids))
    labels = row["labels"][start:stop]
    trained = [False, *(labels[:-1] != IGNORE).tolist()]
    if labels[-1] != IGNORE:  # the last label is no input
        ids.append(int(labels[-1]))
        trained.append(True)
    return marked_runs(tokenizer, ids, trained)


def _shortened(labels: NDArray[Any], used: int, names: Sequence[str]) -> str:
    """Labels as text: the names of classes, or numbers with equal neighbours counted; what is not trained is a dot."""
    flat = np.atleast_1d(labels).ravel()
    if names and labels.dtype.kind == "f":  # one number for every class
        return ", ".join(name for name, value in zip(names, flat, strict=True) if value == 1) or "none"
    values = flat[:used].tolist() if labels.ndim == 1 else flat.tolist()
    if names:
        parts = ["." if value == IGNORE else visible(names[int(value)]) for value in values]
    else:
        parts = []
        for value, same in itertools.groupby("." if one == IGNORE or one != one else f"{one:g}" for one in values):
            count = len(list(same))
            parts.append(value if count == 1 else f"{count}x{value}")
    return " ".join(parts[:60]) + (" ..." if len(parts) > 60 else "")


def _record_text(record: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in record.items() if k != "where"}, ensure_ascii=False)
