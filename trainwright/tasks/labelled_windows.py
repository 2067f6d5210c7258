"""Long sequences of words as windows that overlap, so that every word is read with text on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Window", "windows_of"]


@dataclass(frozen=True)
class Window:
    """Words [first, last) of a sequence; those of [own_first, own_last) are answered for by this window alone."""

    first: int
    last: int
    own_first: int
    own_last: int


def windows_of(sizes: Sequence[int], room: int, overlap: int) -> list[Window]:
    """Windows of whole words with at most `room` tokens, neighbours sharing at most `overlap` of them.

    A word of more than `room` tokens counts as `room`: it is cut, and has a window for itself. The words that two
    windows share are answered for half by each: where a window ends its text is cut off, so its own words are those
    further inside.

    Args:
        sizes: tokens of each word.
    """
    sizes = [min(size, room) for size in sizes]
    spans: list[tuple[int, int]] = []
    first = 0
    while first < len(sizes):
        last, held = first, 0
        while last < len(sizes) and held + sizes[last] <= room:
            held += sizes[last]
            last += 1
        spans.append((first, last))
        if last == len(sizes):
            break
        start, shared = last, 0
        while start - 1 > first and shared + sizes[start - 1] <= overlap:
            start -= 1
            shared += sizes[start]
        # the next window must get further than this one, even where a large word follows
        while start < last and sum(sizes[start : last + 1]) > room:
            start += 1
        first = start
    # spans advance on both ends; a word that is shared goes to the left half or to the right one
    borders = [0, *((b_first + a_last + 1) // 2 for (_, a_last), (b_first, _) in itertools.pairwise(spans))]
    borders.append(len(sizes))
    return [Window(first, last, borders[index], borders[index + 1]) for index, (first, last) in enumerate(spans)]
