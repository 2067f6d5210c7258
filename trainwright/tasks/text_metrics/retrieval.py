"""How well vectors find texts: recall, reciprocal rank and nDCG, every text of the split being a candidate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["retrieval_scores"]

RANKS = (1, 5, 10)
_BLOCK = 1024  # queries whose similarities are held at once


def retrieval_scores(
    queries: NDArray[np.floating], documents: NDArray[np.floating], relevant: list[set[int]]
) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Metrics in [0, 1], means over the queries, and the documents found first, int64 [Q, up to 10].

    recall@k: share of a query's relevant documents among the first k (of k, where there are more). mrr: 1 / rank of the
    first relevant one. ndcg@10: binary gains, 1 / log2(rank + 1). Equal similarities rank in the order of documents.

    Args:
        queries [Q, D], documents [N, D]: vectors of length 1. relevant: for each query, numbers of documents, not none.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    found = {k: np.zeros(len(queries)) for k in RANKS}
    gain = np.zeros(len(queries))
    shown = min(max(RANKS), len(documents))
    first = np.empty((len(queries), shown), dtype=np.int64)
    discounts = 1 / np.log2(np.arange(max(RANKS)) + 2)
    for begin in range(0, len(queries), _BLOCK):
        similarity = queries[begin : begin + _BLOCK] @ documents.T
        order = np.argsort(-similarity, axis=1, kind="stable")
        for row, ranked in enumerate(order):
            number = begin + row
            hits = np.isin(ranked, list(relevant[number]))
            wanted = len(relevant[number])
            ranks[number] = int(np.argmax(hits)) + 1
            for k in RANKS:
                found[k][number] = hits[:k].sum() / min(k, wanted)
            gain[number] = (hits[:10] * discounts[: len(hits[:10])]).sum() / discounts[: min(10, wanted)].sum()
            first[number] = ranked[:shown]
    metrics = {f"recall@{k}": float(found[k].mean()) for k in RANKS}
    return {**metrics, "mrr": float((1 / ranks).mean()), "ndcg@10": float(gain.mean())}, first
