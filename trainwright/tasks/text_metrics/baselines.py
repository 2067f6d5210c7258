"""Answers that need no model: a metric says little until it is set against them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

__all__ = ["BASELINES", "copied", "first_sentence"]

_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s|$)|[。！？；…]+["'”’)」』]*|\n""")


def first_sentence(source: str) -> str:
    """The source up to the end of its first sentence (lead-1), or all of it: Western and Chinese marks and line breaks
    end sentences."""
    text = source.strip()
    match = _END.search(text)
    return text[: match.end()].strip() if match else text


def copied(source: str) -> str:
    """The source itself."""
    return source.strip()


BASELINES: Mapping[str, Callable[[str], str]] = {
    "lead-1 (first sentence)": first_sentence,
    "copy of the source": copied,
}
"""Name in tables to the answer for a source."""
