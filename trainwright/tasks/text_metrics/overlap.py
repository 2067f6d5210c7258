"""BLEU and chrF by sacreBLEU, ROUGE by rouge-score: the numbers that papers compare."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import MissingDependencyError
from trainwright.tasks.text_metrics.words import split_words

__all__ = ["Overlap", "overlap", "packages_missing", "require_packages"]

_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
_NON_ENGLISH = 0.01  # share of letters outside ASCII from which words are those of any script


@dataclass(frozen=True)
class Overlap:
    """Scores from 0 to 100.

    Attributes:
        bleu: corpus BLEU (Post, 2018); chrf: chrF2 (Popović, 2015).
        rouge1, rouge2, rougeL: mean F1 of the texts (Lin, 2004), no stemming.
        notes: how they were computed: sacreBLEU's signatures, the words of ROUGE.
    """

    bleu: float
    chrf: float
    rouge1: float
    rouge2: float
    rougeL: float
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The scores by name."""
        return {name: getattr(self, name) for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL")}


def packages_missing() -> list[str]:
    """Names of the packages that `overlap` needs and that are not installed."""
    return [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def require_packages() -> None:
    """Raise MissingDependencyError unless BLEU and ROUGE can be computed: before training, not after it."""
    missing = packages_missing()
    if missing:
        raise MissingDependencyError(
            f"BLEU, chrF and ROUGE need {' and '.join(missing)}", hint="pip install 'trainwright[metrics]'"
        )


def overlap(predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: str) -> Overlap:
    """Scores of texts against a reference each, or several: BLEU and chrF then count what any of them has, ROUGE the
    nearest. `tokenize` is a name of sacreBLEU's (13a, zh, char, intl, none).

    Raises MissingDependencyError without sacrebleu and rouge-score, ValueError where there are no texts.
    """
    require_packages()
    from sacrebleu.metrics import BLEU, CHRF

    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; expected as many, and some")
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    most = max(map(len, several))
    streams: Any = [[one[n] if n < len(one) else None for one in several] for n in range(most)]
    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    bleu_score = bleu.corpus_score(list(predictions), streams).score
    chrf_score = chrf.corpus_score(list(predictions), streams).score
    words = _rouge_words(tokenize, [text for one in several for text in one])
    rouge = _rouge(predictions, several, words)
    notes = (
        f"BLEU {bleu.get_signature()}",
        f"chrF {chrf.get_signature()}",
        f"ROUGE F1, words: {_WORDS[words]}, no stemming",
    )
    return Overlap(bleu_score, chrf_score, *rouge, notes=notes)


_WORDS = {
    "english": "a-z and 0-9",
    "any": "letters and digits, Chinese by characters",
    "char": "single characters",
}


def _rouge_words(tokenize: str, references: Sequence[str]) -> str:
    if tokenize == "char":
        return "char"
    letters = [character for text in references for character in text if character.isalpha()]
    foreign = sum(not character.isascii() for character in letters)
    return "any" if tokenize == "zh" or foreign > _NON_ENGLISH * len(letters) else "english"


class _Words:
    """A tokenizer in the shape that rouge-score expects."""

    def __init__(self, words: str) -> None:
        self.words = words

    def tokenize(self, text: str) -> list[str]:
        return split_words(text, self.words)


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], words: str) -> tuple[float, float, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer: Any = RougeScorer(list(kinds), tokenizer=_Words(words))
    sums = dict.fromkeys(kinds, 0.0)
    for prediction, several in zip(predictions, references, strict=True):
        scores = [scorer.score(reference, prediction) for reference in several]
        for kind in kinds:
            sums[kind] += max(score[kind].fmeasure for score in scores)
    one, two, longest = (100 * sums[kind] / len(references) for kind in kinds)
    return one, two, longest
