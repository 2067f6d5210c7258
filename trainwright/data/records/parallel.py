"""Two text files whose lines belong together: `train.{de,en}`, the source first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from trainwright.base.errors import DataError
from trainwright.data.documents import Policy, Shard, SourceSpec
from trainwright.data.records.opened import Opened, Options, naming_encoding
from trainwright.data.records.record import Record, Shape
from trainwright.data.sources import list_shards

__all__ = ["is_parallel", "parallel_sources", "read_parallel"]

_BRACES = re.compile(r"\{([^{},]+),([^{},]+)\}")


def is_parallel(spec: SourceSpec) -> bool:
    """Whether a source names two sides in braces."""
    return _BRACES.search(spec.source) is not None


def parallel_sources(spec: SourceSpec) -> tuple[SourceSpec, SourceSpec]:
    """`corpus/train.{de,en}` as the two sources it stands for. Whole names may stand in the braces: `{a.txt,b.txt}`."""
    if len(_BRACES.findall(spec.source)) != 1:
        raise DataError(f"{spec.source}: expected one pair of braces with two endings", hint="write train.{de,en}")
    return tuple(replace(spec, source=_BRACES.sub(rf"\{side}", spec.source)) for side in (1, 2))  # type: ignore[return-value]


def read_parallel(spec: SourceSpec, shape: Shape, options: Options, policy: Policy) -> Iterator[Record]:
    """Line n of the first file with line n of the second. Lines that are empty on one side are reported, and left out.

    Raises DataError where the files do not have as many lines: from there on every pair would be wrong.
    """
    first, second = (list_shards(one) for one in parallel_sources(spec))
    if len(first) != len(second):
        raise DataError(
            f"{spec.source}: {len(first)} files on the side of the source and {len(second)} on that of the target; "
            "expected as many",
            hint="name the two sides so that each file has its partner",
        )
    for source, target in zip(first, second, strict=True):
        with naming_encoding(source), naming_encoding(target):
            yield from _pairs(*(_opened(shard, shape, options, policy) for shard in (source, target)))


def _opened(shard: Shard, shape: Shape, options: Options, policy: Policy) -> Opened:
    return Opened(replace(shard, format="text", encoding=options.encoding), shape, options, policy)


def _pairs(source: Opened, target: Opened) -> Iterator[Record]:
    names = f"{source.shard.url}, {target.shard.url}"
    lines = _numbered(source), _numbered(target)
    for number, (one, other) in enumerate(zip_longest(*lines), start=1):
        if one is None or other is None:
            shorter, longer = (source, target) if one is None else (target, source)
            left = 1 + sum(1 for _ in lines[0 if other is None else 1])
            raise DataError(
                f"{names}: {shorter.shard.url} has {number - 1:,} lines and {longer.shard.url} {number - 1 + left:,}; "
                "expected as many, since line n of one belongs to line n of the other",
                hint="find where they part: a line break inside a sentence, or a cut download",
            )
        where = f"{source.where(number)}"
        if not one.strip() or not other.strip():
            side = source if not one.strip() else target
            source.policy.report("empty-side", f"{side.where(number)}: an empty line; expected a text on both sides")
            continue
        yield Record({"source": one.strip(), "target": other.strip()}, where, f"{source.shard.key}:{number}")


def _numbered(opened: Opened) -> Iterator[str]:
    """Every line in its place; one that cannot be read (and was reported) stands as an empty one."""
    expected = 1
    for number, line in opened.lines():
        while expected < number:
            yield ""
            expected += 1
        yield line
        expected += 1
