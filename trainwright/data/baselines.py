"""What counting reaches: unigram and bigram cross-entropy on the labels that the model is judged by, in nats per token.

A model above the unigram line has learnt less than token frequencies, one above the bigram line less than pairs.

- unigram: p(b) = (c(b) + 1/2) / (N + V/2) (the Jeffreys prior).
- bigram: p(b|a) = (c(a, b) + alpha * p(b)) / (c(a) + alpha), interpolation with a Dirichlet prior (MacKay and Peto,
  "A hierarchical Dirichlet language model", 1995). alpha maximises the leave-one-out likelihood of the training
  pairs, so it needs no held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainwright.data.dataset import IGNORE, TokenDataset
from trainwright.data.mixture import RowOrder

__all__ = ["Baselines", "fit_and_score"]

# Counting more than this moves the bigram line by less than 0.01 nats at vocabulary 8192, and it takes two seconds.
TRAIN_TOKENS = 20_000_000
_CHUNK_TOKENS = 2_000_000
_DENSE_PAIRS = 1 << 24  # vocabularies up to 4096 are counted in a flat table
_ALPHAS = 2.0 ** np.arange(-4, 19)


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies in nats per label, and the number of labels they were measured on."""

    unigram: float
    bigram: float
    labels: int
    alpha: float
    """The strength of the unigram prior that was chosen, in pairs."""

    def to_dict(self) -> dict[str, float]:
        """For an eval record."""
        return {"unigram": self.unigram, "bigram": self.bigram}


def fit_and_score(
    dataset: TokenDataset,
    split: str = "validation",
    *,
    rows: NDArray[np.integer] | None = None,
    train_tokens: int = TRAIN_TOKENS,
) -> Baselines:
    """Fit on the training split, score on the labels of `rows` of `split` (None: all of them).

    Training rows are drawn as training draws them, so a mixture counts by its weights; up to `train_tokens` slots.
    """
    vocabulary = dataset.vocab_size
    order = RowOrder(dataset.groups("train"), seed=0)
    wanted = min(order.rows, -(-train_tokens // dataset.sequence_length))
    pairs, counts = _count(dataset, "train", order(np.arange(wanted, dtype=np.int64)))
    before, after = np.divmod(pairs, vocabulary)
    labels = np.bincount(after, weights=counts, minlength=vocabulary)
    contexts = np.bincount(before, weights=counts, minlength=vocabulary)
    unigram = (labels + 0.5) / (labels.sum() + 0.5 * vocabulary)
    alpha = _best_alpha(counts, contexts[before], unigram[after])

    scored = np.arange(dataset.rows(split), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
    seen, times = _count(dataset, split, scored)
    total = int(times.sum())
    context, label = np.divmod(seen, vocabulary)
    place = np.minimum(np.searchsorted(pairs, seen), len(pairs) - 1)
    joint = np.where(pairs[place] == seen, counts[place], 0)
    bigram = (joint + alpha * unigram[label]) / (contexts[context] + alpha)
    return Baselines(
        unigram=float(-(times * np.log(unigram[label])).sum() / total),
        bigram=float(-(times * np.log(bigram)).sum() / total),
        labels=total,
        alpha=float(alpha),
    )


def _count(dataset: TokenDataset, split: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct (input, label) pairs as input * vocabulary + label, ascending, and how often each is trained."""
    vocabulary = dataset.vocab_size
    step = max(1, _CHUNK_TOKENS // dataset.sequence_length)
    dense = np.zeros(vocabulary**2 if vocabulary**2 <= _DENSE_PAIRS else 0, dtype=np.int64)
    chunks = []
    for begin in range(0, len(rows), step):
        batch = dataset.batch(split, rows[begin : begin + step])
        trained = batch["labels"] != IGNORE
        keys = batch["input_ids"][trained] * vocabulary + batch["labels"][trained]
        if dense.size:
            dense += np.bincount(keys, minlength=dense.size)
        else:
            chunks.append(np.unique(keys, return_counts=True))
    if dense.size:
        pairs = np.flatnonzero(dense)
        return pairs, dense[pairs]
    keys = np.concatenate([keys for keys, _ in chunks])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], np.concatenate([counts for _, counts in chunks])[order]
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[first], np.add.reduceat(counts, first)


def _best_alpha(counts: NDArray[np.int64], context: NDArray[Any], prior: NDArray[np.float64]) -> float:
    """The alpha with the highest leave-one-out likelihood: each pair is predicted from all the others."""
    scores = [
        float((counts * (np.log(counts - 1 + alpha * prior) - np.log(context - 1 + alpha))).sum()) for alpha in _ALPHAS
    ]
    return float(_ALPHAS[int(np.argmax(scores))])
