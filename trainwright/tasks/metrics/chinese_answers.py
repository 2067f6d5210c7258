"""Exact match and F1 of Chinese answers as CMRC 2018 defines them (arXiv 1810.07366).

Chinese characters count one by one, runs of anything else as words; F1 is that of the longest run of units that both
texts have in common. The official script cuts the words of other scripts with NLTK; here a word is a run of letters and
digits (with a point or apostrophe inside), and any other character stands alone: the same for numbers and plain words.
"""

from __future__ import annotations

import re

__all__ = ["chinese_exact", "chinese_f1", "is_chinese", "units"]

_CHINESE = re.compile(r"[\u4e00-\u9fa5]")
_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_WORDS = re.compile(r"\w+(?:[.,']\w+)*|[^\w\s]")


def is_chinese(text: str) -> bool:
    """Whether any character is Chinese."""
    return _CHINESE.search(text) is not None


def _without_punctuation(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _PUNCTUATION)


def units(text: str) -> list[str]:
    """Single Chinese characters, and words of other scripts, without punctuation."""
    found: list[str] = []
    run = ""
    for character in text.lower().strip():
        if character in _PUNCTUATION:  # is left out, and does not part what stands around it
            continue
        if _CHINESE.match(character):
            found += [*_WORDS.findall(run), character]
            run = ""
        else:
            run += character
    return found + _WORDS.findall(run)


def chinese_exact(expected: str, given: str) -> float:
    """1 where both texts are the same without case and punctuation."""
    return float(_without_punctuation(expected) == _without_punctuation(given))


def chinese_f1(expected: str, given: str) -> float:
    """From the longest run of units that both texts share; 0 where there is none."""
    of_expected, of_given = units(expected), units(given)
    shared = _longest_shared_run(of_expected, of_given)
    return 2 * shared / (len(of_expected) + len(of_given)) if shared else 0.0


def _longest_shared_run(a: list[str], b: list[str]) -> int:
    longest = 0
    row = [0] * (len(b) + 1)  # lengths of the shared runs that end at the previous unit of a
    for unit in a:
        new = [0] * (len(b) + 1)
        for place, other in enumerate(b, 1):
            if unit == other:
                new[place] = row[place - 1] + 1
                longest = max(longest, new[place])
        row = new
    return longest
