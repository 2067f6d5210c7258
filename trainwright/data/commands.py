"""The verbs of `trainwright data`, as functions that return lines: build, inspect, preview."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainwright.base.text import human_bytes
from trainwright.data.build import build_dataset, prepare_dataset
from trainwright.data.builder import Progress
from trainwright.data.dataset import IGNORE, TokenDataset
from trainwright.data.examples.build import ExampleDefinition, build_examples
from trainwright.data.examples.manifest import is_examples
from trainwright.data.examples.preview import describe_examples, inspect_examples, preview_examples
from trainwright.data.examples.spec import example_spec
from trainwright.data.manifest import Manifest, SplitFacts
from trainwright.data.marking import legend, marked_lines, marked_runs, visible
from trainwright.data.mixture import RowOrder
from trainwright.data.spec import build_spec

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["build", "describe", "inspect", "preview"]


def build(
    loaded: Any,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    model_tokenizer: str | None = None,
    definition: ExampleDefinition | None = None,
) -> list[str]:
    """Build the dataset of a loaded recipe, in `out` or in the recipe's cache, and describe it.

    Args:
        definition: of the recipe's task, where that is made of records; None where it learns from running text.

    Returns: the folder, then its description.
    """
    data = loaded.recipe.data
    wanted = workers if workers is not None else (None if data.workers == "auto" else data.workers)
    if definition is not None:
        wish = example_spec(data, loaded.recipe.task, model_tokenizer=model_tokenizer)
        examples = build_examples(wish, definition, data.cache, out=out, workers=wanted, progress=progress)
        return [str(examples.folder), *describe_examples(examples)]
    spec = build_spec(data, model_tokenizer=model_tokenizer)
    if out is not None:
        manifest, folder = build_dataset(spec, out, wanted, progress), Path(out)
    else:
        dataset = prepare_dataset(spec, data.cache, wanted, progress)
        manifest, folder = dataset.manifest, dataset.folder
    return [str(folder), *describe(manifest)]


def inspect(folder: str | Path, *, verify: bool = True) -> list[str]:
    """Describe a dataset folder; `verify` reads every byte and compares it with the manifest's hashes."""
    if is_examples(Path(folder)):
        return inspect_examples(folder, verify=verify)
    dataset = TokenDataset.open(folder, verify="hashes" if verify else "sizes")
    size = sum(facts.bytes for facts in dataset.manifest.files.values())
    state = "every block matches its hash" if verify else "sizes match"
    return [f"{folder}: {len(dataset.manifest.files)} files, {human_bytes(size)}, {state}", *describe(dataset.manifest)]


def describe(manifest: Manifest) -> list[str]:
    """What a dataset holds, in lines for a terminal."""
    mask = "documents masked" if manifest.document_mask else "documents see each other"
    lines = [
        f"fingerprint   {manifest.fingerprint}",
        f"tokenizer     {manifest.vocab_size:,} tokens, {manifest.tokenizer_fingerprint}; "
        f"{manifest.token_dtype} on disk, end of text {'added' if manifest.append_eos else 'not added'}",
        f"rows          {manifest.sequence_length} tokens, packing {manifest.packing}, {mask}",
    ]
    for name, facts in manifest.splits.items():
        lines += _describe_split(name, facts, manifest.sequence_length)
    for source in manifest.sources:
        rule = {"hash": "split by document", "tail": "tail of each document held out"}.get(
            source["split"], f"all {source['split']}"
        )
        share = f" (holds out {source['fraction']:.2%})" if source["fraction"] else ""
        lines.append(f"source        {source['name']}: {len(source['shards'])} files, {rule}{share}")
    if manifest.problems:
        found = ", ".join(f"{count:,} {kind}" for kind, count in manifest.problems.items())
        lines.append(f"left out      {found}")
        lines += [f"  {visible(example)}" for example in manifest.problem_examples]
    lines += [f"warning       {note}" for note in manifest.notes]
    return lines


def _describe_split(name: str, facts: SplitFacts, length: int) -> Iterator[str]:
    ratio = facts.bytes / facts.tokens if facts.tokens else 0.0
    yield (
        f"{name:<13} {facts.documents:,} documents, {human_bytes(facts.bytes)} of text, {facts.tokens:,} tokens "
        f"({ratio:.2f} bytes a token), {facts.rows:,} rows"
    )
    yield (
        f"{'':<13} {facts.trained_tokens:,} trained tokens, padding {facts.padding_share(length):.2%}, "
        f"{facts.split_documents:,} documents cut, {facts.dropped_documents:,} dropped, "
        f"{facts.unknown_tokens:,} unknown tokens"
    )
    if len(facts.groups) > 1:
        shares = RowOrder(facts.groups, seed=0).weights
        for group in facts.groups:
            yield f"{'':<13} {group.name}: {group.rows:,} rows, drawn {shares[group.name]:.2%} of the time"


def preview(
    target: Any,
    *,
    rows: int = 3,
    split: str = "train",
    seed: int = 0,
    color: bool = False,
    width: int = 100,
    characters: int = 1200,
    model_tokenizer: str | None = None,
    names: Sequence[str] = (),
) -> list[str]:
    """The first rows that training would draw, decoded, with the trained tokens marked.

    Args:
        target: a dataset folder, or a loaded recipe of running text (whose dataset is built if need be).
        color: trained text in green and context dim; False marks trained text with « ».
        width: cells of a line; Chinese characters take two.
        characters: how much of each row is shown.
        names: of labels that stand for classes, in order.
    """
    from trainwright.data.tokenizers import load_tokenizer

    if isinstance(target, (str, Path)):
        if is_examples(Path(target)):
            return preview_examples(
                target,
                rows=rows,
                split=split,
                seed=seed,
                color=color,
                width=width,
                characters=characters,
                names=names,
            )
        dataset = TokenDataset.open(target)
    else:
        data = target.recipe.data
        dataset = prepare_dataset(
            build_spec(data, model_tokenizer=model_tokenizer),
            data.cache,
            None if data.workers == "auto" else data.workers,
        )
    tokenizer = load_tokenizer(str(dataset.tokenizer_folder))
    order = RowOrder(dataset.groups(split), seed)
    draws = np.arange(min(rows, order.rows), dtype=np.int64)
    lines = [f"{dataset.folder}", *_describe_split(split, dataset.facts(split), dataset.sequence_length)]
    lines.append(legend(color))
    for draw, row in zip(draws.tolist(), order(draws).tolist(), strict=True):
        lines += _preview_row(dataset.row(split, row), tokenizer, f"draw {draw}: row {row}", color, width, characters)
    return lines


def _preview_row(
    row: dict[str, NDArray[Any]], tokenizer: Tokenizer, title: str, color: bool, width: int, characters: int
) -> Iterator[str]:
    length = len(row["input_ids"])
    pieces = _pieces(row)
    trained = int((row["labels"] != IGNORE).sum())
    used = sum(stop - start for start, stop in pieces)
    yield ""
    yield (
        f"--- {title}: {len(pieces)} piece{'s' * (len(pieces) != 1)}, {trained} of {length} labels trained, "
        f"{length - used} padding"
    )
    for start, stop in pieces:
        yield from marked_lines(
            _spans(row, start, stop, tokenizer), color, width, characters * (stop - start) // length + 80
        )


def _pieces(row: dict[str, NDArray[Any]]) -> list[tuple[int, int]]:
    """Stretches of slots that belong together: documents where the row knows them, else all of it; no padding."""
    length = len(row["input_ids"])
    if "document_ids" in row:
        ids = row["document_ids"]
        bounds = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), length]
        found = list(itertools.pairwise(bounds))
    else:
        found = [(0, length)]
    # the last stretch may be padding, or end in it: untrained slots that repeat one id to the end of the row
    start, stop = found[-1]
    labels, ids = row["labels"], row["input_ids"]
    if labels[-1] == IGNORE:
        tail = stop
        while tail > start and labels[tail - 1] == IGNORE and ids[tail - 1] == ids[-1]:
            tail -= 1
        if stop - tail > 1 or tail == start:
            found[-1] = (start, tail)
    return [(a, b) for a, b in found if b > a]


def _spans(row: dict[str, NDArray[Any]], start: int, stop: int, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of a piece in runs: (text, trained). A token is trained when it is the label of the slot before it."""
    ids, labels = row["input_ids"], row["labels"]
    tokens = [int(ids[start])]
    marks = [False]
    for slot in range(start, stop):
        if labels[slot] != IGNORE:
            tokens.append(int(labels[slot]))
            marks.append(True)
        elif slot + 1 < stop:
            tokens.append(int(ids[slot + 1]))
            marks.append(False)
    return marked_runs(tokenizer, tokens, marks)
