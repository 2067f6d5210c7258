"""The verbs of `trainwright data`, as functions that return lines: build, inspect, preview."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, chop_cells

from trainwright.base.text import human_bytes
from trainwright.data.build import Progress, build_dataset, prepare_dataset
from trainwright.data.dataset import IGNORE, TokenDataset
from trainwright.data.manifest import Manifest, SplitFacts
from trainwright.data.mixture import RowOrder
from trainwright.data.spec import build_spec

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["build", "describe", "inspect", "preview"]

_CONTEXT, _TRAINED, _QUIET, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[2;3m", "\x1b[0m"
_OPEN, _CLOSE = "«", "»"


def build(
    loaded: Any,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    model_tokenizer: str | None = None,
) -> list[str]:
    """Build the dataset of a loaded recipe, in `out` or in the recipe's cache, and describe it."""
    data = loaded.recipe.data
    spec = build_spec(data, model_tokenizer=model_tokenizer)
    wanted = workers if workers is not None else (None if data.workers == "auto" else data.workers)
    if out is not None:
        manifest, folder = build_dataset(spec, out, wanted, progress), Path(out)
    else:
        dataset = prepare_dataset(spec, data.cache, wanted, progress)
        manifest, folder = dataset.manifest, dataset.folder
    return [str(folder), *describe(manifest)]


def inspect(folder: str | Path, *, verify: bool = True) -> list[str]:
    """Describe a dataset folder; `verify` reads every byte and compares it with the manifest's hashes."""
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
        lines += [f"  {_visible(example)}" for example in manifest.problem_examples]
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
) -> list[str]:
    """The first rows that training would draw, decoded, with the trained tokens marked.

    Args:
        target: a dataset folder, or a loaded recipe (whose dataset is built if need be).
        color: trained text in green and context dim; False marks trained text with « ».
        width: cells of a line; Chinese characters take two.
        characters: how much of each row is shown.
    """
    from trainwright.data.tokenizers import load_tokenizer

    if isinstance(target, (str, Path)):
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
    lines.append("trained text is green, context is dim" if color else f"trained text stands in {_OPEN}{_CLOSE}")
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
        yield from _marked(
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
    spans = []
    begin = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or marks[end] != marks[begin]:
            spans.append((tokenizer.decode(tokens[begin:end], skip_special=False), marks[begin]))
            begin = end
    return spans


def _marked(spans: list[tuple[str, bool]], color: bool, width: int, characters: int) -> Iterator[str]:
    """Lines of a piece, wrapped to `width` cells; what is beyond `characters` is counted instead of shown."""
    line, used, left = "", 0, characters
    hidden = 0
    for text, trained in spans:
        shown = _visible(text[:left])
        hidden += len(text) - min(len(text), left)
        left -= min(len(text), left)
        if not shown:
            continue
        begin, end = (
            ((_TRAINED if trained else _CONTEXT), _RESET) if color else ((_OPEN, _CLOSE) if trained else ("", ""))
        )
        for number, part in enumerate(_wrap(shown, width, used)):
            if number:
                yield "  " + line
                line, used = "", 0
            line += f"{begin}{part}{end}" if part else ""
            used += cell_len(part)
    if line:
        yield "  " + line
    if hidden:
        more = f"... {hidden:,} more characters"
        yield f"  {_QUIET}{more}{_RESET}" if color else f"  {more}"


def _wrap(text: str, width: int, used: int) -> list[str]:
    """Text in parts of at most `width` cells, the first after `used` cells of its line."""
    first = ""
    room = max(width - used, 0)
    taken = 0
    for character in text:
        size = cell_len(character)
        if taken + size > room:
            break
        first += character
        taken += size
    rest = text[len(first) :]
    return [first, *(chop_cells(rest, width) if rest else [])]


def _visible(text: str) -> str:
    """Control characters as symbols: data must not be able to steer a terminal, and a line break must be seen."""
    marks = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(
        marks.get(character) or (character if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp") else "·")
        for character in text
    )
