"""Text for a terminal with the trained parts marked: green where there is colour, « » where there is none."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells

if TYPE_CHECKING:
    from trainwright.data.tokenizers import Tokenizer

__all__ = ["legend", "marked_lines", "marked_runs", "visible"]

_CONTEXT, _TRAINED, _QUIET, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[2;3m", "\x1b[0m"
_OPEN, _CLOSE = "«", "»"

Run = tuple[str, bool]
"""Text, and whether it is trained."""


def legend(color: bool) -> str:
    """What the marks mean."""
    return "trained text is green, context is dim" if color else f"trained text stands in {_OPEN}{_CLOSE}"


def marked_runs(tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> list[Run]:
    """Tokens as text, in runs that are trained or not.

    A run is what the text grows by when its tokens are added, so that spaces between pieces of words stay and no
    character is cut in two.
    """
    runs: list[Run] = []
    text = ""
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[begin]:
            longer = tokenizer.decode(ids[:end], skip_special=False)
            if end < len(ids):
                longer = longer.rstrip("\ufffd")  # bytes of a character that is not whole yet
            same = next((at for at, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), len(text))
            runs.append((longer[same:], bool(trained[begin])))
            text, begin = longer, end
    return runs


def marked_lines(runs: Sequence[Run], color: bool, width: int, characters: int) -> Iterator[str]:
    """Lines of a piece, wrapped to `width` cells; what is beyond `characters` is counted instead of shown."""
    line, used, left = "", 0, characters
    hidden = 0
    for text, trained in runs:
        shown = visible(text[:left])
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


def visible(text: str) -> str:
    """Control characters as symbols: data must not be able to steer a terminal, and a line break must be seen."""
    marks = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(
        marks.get(character) or (character if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp") else "·")
        for character in text
    )
