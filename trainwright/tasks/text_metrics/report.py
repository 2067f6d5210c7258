"""The report of a task that writes texts: the model's answers beside the baselines', and what was wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from trainwright.tasks.task import LISTED_ERRORS, Report, Table
from trainwright.tasks.text_metrics.baselines import BASELINES
from trainwright.tasks.text_metrics.overlap import Overlap, overlap
from trainwright.tasks.text_metrics.words import choose_words

__all__ = ["Written", "text_report"]


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        source: what was asked; reference: what was expected; text: what was written.
        others: further references, which count as much.
        ended: whether the model ended it by itself.
        tokens: how many tokens were written.
    """

    source: str
    reference: str
    text: str
    ended: bool
    tokens: int
    others: tuple[str, ...] = ()


def text_report(
    answers: Sequence[Written],
    *,
    tokenize: str = "auto",
    with_overlap: bool = True,
    baselines: Mapping[str, Callable[[str], str]] = BASELINES,
) -> Report:
    """Metrics of `answers` (at least one): exact_match and eos_rate in [0, 1], BLEU, chrF and ROUGE from 0 to 100,
    length_ratio (characters written for each one expected) and mean_tokens; the baselines stand in the table.

    Raises MissingDependencyError where overlap is wanted and its packages are not installed.
    """
    if not answers:
        raise ValueError("a report needs at least one answer")
    references = [[text.strip() for text in (answer.reference, *answer.others)] for answer in answers]
    words = choose_words(tokenize, [one[0] for one in references])
    systems = {"model": [answer.text.strip() for answer in answers]}
    systems |= {name: [make(answer.source) for answer in answers] for name, make in baselines.items()}
    rows, notes = [], []
    metrics: dict[str, float] = {}
    for name, texts in systems.items():
        scores = overlap(texts, references, words) if with_overlap else None
        of_system = _metrics(texts, references, scores)
        rows.append((name, *of_system.values()))
        if name == "model":
            metrics = of_system
            notes = list(scores.notes) if scores else []
    columns = ("answers of", *metrics)
    metrics = {
        **metrics,
        "eos_rate": fmean(answer.ended for answer in answers),
        "mean_tokens": fmean(answer.tokens for answer in answers),
    }
    notes.append(
        f"{len(answers)} texts; {100 * metrics['eos_rate']:.1f} % ended by the model itself, "
        f"{metrics['mean_tokens']:.1f} tokens written on average"
    )
    return Report(
        metrics=metrics,
        tables=(Table("Texts", columns, tuple(rows), tuple(notes)),),
        errors=tuple(
            {"text": answer.source, "expected": several[0], "predicted": answer.text.strip(), "ended": answer.ended}
            for answer, several in zip(answers, references, strict=True)
            if answer.text.strip() not in several
        )[:LISTED_ERRORS],
    )


def _metrics(texts: Sequence[str], references: Sequence[Sequence[str]], scores: Overlap | None) -> dict[str, float]:
    written, expected = sum(map(len, texts)), sum(len(several[0]) for several in references)
    return {
        "exact_match": fmean(text in several for text, several in zip(texts, references, strict=True)),
        **(scores.metrics() if scores else {}),
        "length_ratio": written / expected if expected else float(bool(written)),
    }
