"""How good answers are: the official metrics, what a trivial baseline reaches, and what was answered wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.tasks.metrics.answers import answer_scores, best_threshold, scorer_for
from trainwright.tasks.task import LISTED_ERRORS, Record, Report, Table
from trainwright.tasks.text_metrics import first_sentence

__all__ = ["answer_report"]


def answer_report(
    pairs: Sequence[tuple[Record, Mapping[str, Any]]], *, scoring: str = "auto", threshold: float = 0.0
) -> Report:
    """Metrics of predictions against records that say the answer; see `answer_scores` for their definition.

    Where some questions have no answer, "best_f1" and "best_exact" are those at the null threshold that would have been
    best for these questions, which "best_f1_threshold" and "best_exact_threshold" name. The baseline answers "no
    answer" to all, or, where every question has one, the first sentence of the text; the better one is shown.
    """
    keys = [str(record.get("id", number)) for number, (record, _) in enumerate(pairs)]
    if len(set(keys)) < len(keys):  # ids that come twice: count places instead
        keys = [str(number) for number in range(len(pairs))]
    gold = {key: list(record["answers"]["text"]) for key, (record, _) in zip(keys, pairs, strict=True)}
    given = {key: str(prediction["prediction_text"]) for key, (_, prediction) in zip(keys, pairs, strict=True)}
    scorer = scorer_for([text for texts in gold.values() for text in texts[:1]], scoring)
    metrics, each = answer_scores(gold, given, scorer)
    rows: list[tuple[Any, ...]] = [("all", metrics["exact"], metrics["f1"], len(gold))]
    answered = sum(bool(texts) for texts in gold.values())
    if 0 < answered < len(gold):
        rows += [
            ("with an answer", metrics["has_answer_exact"], metrics["has_answer_f1"], answered),
            ("without an answer", metrics["no_answer_exact"], metrics["no_answer_f1"], len(gold) - answered),
        ]
    baseline, name = _baseline(gold, {key: record for key, (record, _) in zip(keys, pairs, strict=True)}, scorer)
    metrics |= {"baseline_exact": baseline[0], "baseline_f1": baseline[1]}
    rows.append((f"baseline: {name}", *baseline, len(gold)))
    notes = [f"as {scorer.name} defines them"]
    if 0 < answered < len(gold):
        best = _best(gold, {key: prediction for key, (_, prediction) in zip(keys, pairs, strict=True)}, scorer)
        metrics |= best
        notes.append(
            f"null threshold {threshold:g}; the best F1 here, {best['best_f1']:.4f}, is at "
            f"{best['best_f1_threshold']:.2f}"
        )
    errors = [
        {
            **{key: record[key] for key in ("where", "id") if record.get(key) is not None},
            "text": record["question"],
            "expected": list(dict.fromkeys(gold[key])) or "no answer",
            "predicted": given[key] or "no answer",
            "f1": each[key][1],
            "context": record["context"],
        }
        for key, (record, _) in zip(keys, pairs, strict=True)
        if each[key][0] < 1
    ]
    errors.sort(key=lambda error: float(error["f1"]))
    table = Table("answers", ("", "exact", "f1", "questions"), tuple(rows), tuple(notes))
    return Report(metrics, (table,), errors=tuple(errors[:LISTED_ERRORS]))


def _baseline(
    gold: Mapping[str, Sequence[str]], records: Mapping[str, Record], scorer: Any
) -> tuple[tuple[float, float], str]:
    """(exact, F1) and the name of the better of the two answers that need no model."""
    guesses = {
        "no answer": dict.fromkeys(gold, ""),
        "the first sentence": {key: first_sentence(record["context"]) for key, record in records.items()},
    }
    found = {}
    for name, guess in guesses.items():
        metrics, _ = answer_scores(gold, guess, scorer)
        found[name] = (metrics["exact"], metrics["f1"])
    name = max(found, key=lambda name: (found[name][1], found[name][0]))
    return found[name], name


def _best(
    gold: Mapping[str, Sequence[str]], predictions: Mapping[str, Mapping[str, Any]], scorer: Any
) -> dict[str, float]:
    """What the best null thresholds would give."""
    texts = {key: p["n_best"][0]["text"] for key, p in predictions.items() if p.get("n_best")}
    null = {key: float(predictions[key]["null_score"]) for key in texts}
    has = {key: bool(answers) for key, answers in gold.items()}
    _, each = answer_scores(gold, texts, scorer)
    found: dict[str, float] = {}
    for index, what in enumerate(("exact", "f1")):
        scores = {key: each[key][index] for key in texts}
        found[f"best_{what}"], found[f"best_{what}_threshold"] = best_threshold(scores, null, has)
    return found
