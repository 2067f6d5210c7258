"""Numbers and words for people: counts, bytes, seconds, nearest names, and columns that stay straight in any script."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

__all__ = [
    "align_columns",
    "did_you_mean",
    "display_width",
    "human_bytes",
    "human_count",
    "human_duration",
    "nearest",
    "pad_to_width",
]

_COUNT_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_STEPS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def human_count(value: float, *, digits: int = 3) -> str:
    """41234 -> "41.2k", 950 -> "950", 1.5e9 -> "1.5B": `digits` significant digits, decimal steps."""
    sign, size = ("-", -value) if value < 0 else ("", value)
    for scale, suffix in _COUNT_STEPS:
        # 999_950 rounds to "1000k" at three digits: it belongs to the next step up.
        if size >= scale * (1 - 0.5 * 10**-digits):
            return sign + _significant(size / scale, digits) + suffix
    return sign + (str(int(size)) if float(size).is_integer() else _significant(size, digits))


def human_bytes(value: float, *, digits: int = 3) -> str:
    """1288490188 -> "1.2 GiB": powers of 1024, `digits` significant digits."""
    for scale, suffix in _BYTE_STEPS:
        if value >= scale:
            return f"{_significant(value / scale, digits)} {suffix}"
    return f"{int(value)} B"


def human_duration(seconds: float) -> str:
    """0.0042 -> "4.2ms", 12.3 -> "12.3s", 192 -> "3m12s", 7500 -> "2h05m", 180000 -> "2d02h"."""
    if seconds < 0:
        return "-" + human_duration(-seconds)
    if seconds < 0.9995:
        return f"{_significant(seconds * 1000, 3)}ms"
    if seconds < 59.95:
        return f"{_significant(seconds, 3)}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _significant(value: float, digits: int) -> str:
    """`value` with at most `digits` significant digits, never in scientific notation, no trailing zeros."""
    whole = len(str(int(value))) if value >= 1 else 1
    text = f"{value:.{max(0, digits - whole)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` most likely stands for, or None when none is close."""
    names = {name.casefold(): name for name in candidates}
    found = difflib.get_close_matches(word.casefold(), names, n=1, cutoff=0.6)
    if found:
        return names[found[0]]
    # difflib misses short forms: "vocab" for "vocab_size". Accept one only when it is the only reading.
    starts = [name for key, name in names.items() if len(word) >= 3 and key.startswith(word.casefold())]
    return starts[0] if len(starts) == 1 else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """ " Did you mean 'steps'?" (with the leading space), or "" when nothing is close: ready to append to a message."""
    found = nearest(word, candidates)
    return f" Did you mean {found!r}?" if found else ""


def display_width(text: str) -> int:
    """Terminal cells that `text` takes: 2 for wide (Chinese, Japanese, Korean, most emoji), 0 for combining marks."""
    width = 0
    for character in text:
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        width += 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
    return width


def pad_to_width(text: str, width: int, *, right: bool = False) -> str:
    """Fill with spaces to `width` terminal cells, on the left when `right` aligned; longer text stays as it is."""
    space = " " * max(0, width - display_width(text))
    return space + text if right else text + space


def align_columns(rows: Sequence[Sequence[str]], *, gap: str = "  ", right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines with straight columns; `right` lists the columns to align right. No trailing spaces."""
    if not rows:
        return []
    columns = max(len(row) for row in rows)
    widths = [max((display_width(row[i]) for row in rows if i < len(row)), default=0) for i in range(columns)]
    return [
        gap.join(pad_to_width(cell, widths[i], right=i in right) for i, cell in enumerate(row)).rstrip() for row in rows
    ]
