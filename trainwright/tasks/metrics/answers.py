"""Exact match and F1 of answers: SQuAD's definition (arXiv 1606.05250, 1806.03822), and CMRC 2018's for Chinese."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainwright.tasks.metrics.chinese_answers import chinese_exact, chinese_f1, is_chinese

__all__ = [
    "AnswerScores",
    "answer_scores",
    "best_threshold",
    "exact",
    "f1",
    "normalize",
    "scorer_for",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and needless space, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(expected: str, given: str) -> float:
    """1 where both texts are the same once normalized."""
    return float(normalize(expected) == normalize(given))


def f1(expected: str, given: str) -> float:
    """Overlap of the words of both; where one of them has none, 1 if neither has any, else 0."""
    of_expected, of_given = normalize(expected).split(), normalize(given).split()
    if not of_expected or not of_given:
        return float(of_expected == of_given)
    shared = sum((Counter(of_expected) & Counter(of_given)).values())
    return 2 * shared / (len(of_expected) + len(of_given))


@dataclass(frozen=True)
class AnswerScores:
    """How one pair of texts is compared: `name` of the definition, exact match, F1, both in [0, 1]."""

    name: str
    exact: Callable[[str, str], float]
    f1: Callable[[str, str], float]


SQUAD = AnswerScores("SQuAD", exact, f1)
CMRC = AnswerScores("CMRC 2018", chinese_exact, chinese_f1)


def scorer_for(texts: Sequence[str], scoring: str = "auto") -> AnswerScores:
    """The definition called "squad" or "cmrc"; "auto" takes CMRC's where most of the texts have Chinese characters."""
    if scoring == "auto":
        scoring = "cmrc" if 2 * sum(map(is_chinese, texts)) > len(texts) else "squad"
    return {"squad": SQUAD, "cmrc": CMRC}[scoring]


def answer_scores(
    gold: Mapping[str, Sequence[str]], given: Mapping[str, str], scorer: AnswerScores = SQUAD
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics over all questions, and (exact, F1) of each.

    Args:
        gold: question id to its acceptable answers; none where the question has no answer. The best of them counts.
        given: question id to the predicted text, "" for no answer. A question that is missing here counts 0.

    Returns: "exact" and "f1" over all, and over the questions with ("has_answer_...") and without ("no_answer_...") an
    answer where there are both kinds; the shares are of the questions of that kind.
    """
    each: dict[str, tuple[float, float]] = {}
    for key, answers in gold.items():
        # SQuAD 2: answers that normalize to nothing are not answers.
        acceptable = [answer for answer in answers if scorer.name != "SQuAD" or normalize(answer)] or [""]
        text = given.get(key)
        if text is None:
            each[key] = (0.0, 0.0)
        elif acceptable == [""]:
            each[key] = (scorer.exact("", text), float(not text.strip()) if scorer is CMRC else scorer.f1("", text))
        else:
            each[key] = (
                max(scorer.exact(answer, text) for answer in acceptable),
                max(scorer.f1(answer, text) for answer in acceptable),
            )
    kinds = {"": list(gold)}
    answered = [key for key, answers in gold.items() if answers]
    if 0 < len(answered) < len(gold):
        kinds["has_answer_"] = answered
        kinds["no_answer_"] = [key for key, answers in gold.items() if not answers]
    metrics = {
        f"{kind}{what}": sum(each[key][index] for key in keys) / len(keys) if keys else 0.0
        for kind, keys in kinds.items()
        for index, what in enumerate(("exact", "f1"))
    }
    return metrics, each


def best_threshold(
    scores: Mapping[str, float], null_scores: Mapping[str, float], has_answer: Mapping[str, bool]
) -> tuple[float, float]:
    """(best mean score, the null threshold that gives it), as SQuAD 2's evaluation finds it.

    Args:
        scores: of the best text that is an answer, for each question.
        null_scores: how much more "no answer" scores than that text; a question is answered where this is at most the
            threshold.
        has_answer: whether the question has one.
    """
    current = float(sum(not has for has in has_answer.values()))  # nothing is answered
    best, threshold = current, min(null_scores.values(), default=0.0) - 1.0
    for key in sorted(null_scores, key=lambda key: (null_scores[key], key)):
        if key not in scores:
            continue
        current += scores[key] if has_answer[key] else -1.0
        if current > best:
            best, threshold = current, null_scores[key]
    return best / len(has_answer) if has_answer else 0.0, threshold
