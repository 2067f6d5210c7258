"""What a word is to BLEU and ROUGE: a matter of language, chosen once for a whole report and named in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["choose_words", "is_chinese", "split_words"]

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_HAN_LETTER = re.compile(f"[{_HAN}]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\u1100-\u11ff\uac00-\ud7af]")
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_ENGLISH_WORD = re.compile(r"[a-z0-9]+")  # what rouge-score's own tokenizer keeps


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether at least 30 % of the letters are Chinese characters and none of the kana and hangul that would make the
    texts Japanese or Korean."""
    letters = han = other = 0
    for text in texts:
        letters += sum(character.isalpha() for character in text)
        han += len(_HAN_LETTER.findall(text))
        other += len(_KANA_OR_HANGUL.findall(text))
    return letters > 0 and han >= 0.3 * letters and other < 0.05 * letters


def choose_words(tokenize: str, references: Iterable[str]) -> str:
    """sacreBLEU's name of the tokenization: `tokenize` itself, or for "auto" zh for Chinese and 13a for the rest."""
    if tokenize != "auto":
        return tokenize
    return "zh" if is_chinese(references) else "13a"


def split_words(text: str, words: str) -> list[str]:
    """Words for ROUGE and lengths, lower case, without punctuation.

    `words` "char": every letter and digit; "english": runs of a-z and 0-9, as rouge-score has it; else letters and
    digits of any script, Chinese characters one by one.
    """
    text = unicodedata.normalize("NFC", text).lower()
    if words == "english":
        return _ENGLISH_WORD.findall(text)
    if words == "char":
        return [character for character in text if character.isalnum()]
    return _WORD.findall(text)
