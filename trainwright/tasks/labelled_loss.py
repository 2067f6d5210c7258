"""Losses of labels as sums over rows, in float32, and what dropout twice (R-Drop) adds to them.

The count of a micro-batch is the number of its labelled rows, whatever the weights are: weights are scaled over the
training data once, so that the sum over micro-batches and ranks does not depend on how rows are dealt to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.data.dataset import IGNORE
from trainwright.models.embedding_noise import SECOND_PASS

__all__ = [
    "auxiliary",
    "binary_distance",
    "binary_losses",
    "class_distance",
    "class_losses",
    "number_losses",
    "twice",
]


def class_losses(
    scores: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy [...] of scores [..., L] against labels [...], in nats; 0 where the label is IGNORE.

    Args:
        weights: [L], of the true label.
        gamma: focal loss, arXiv 1708.02002: times (1 - p)^gamma, p the probability of the true label.
        smoothing: share of the target that is spread over all labels.
    """
    log_probs = scores.float().log_softmax(-1)
    known = labels != IGNORE
    target = torch.where(known, labels, 0)
    of_target = log_probs.gather(-1, target[..., None]).squeeze(-1)
    losses = -of_target
    if smoothing:
        losses = (1.0 - smoothing) * losses - smoothing * log_probs.mean(-1)
    if gamma:
        # -expm1 keeps 1 - p exact near p = 1; the floor keeps the gradient of a power below 1 finite there
        losses = losses * (-torch.expm1(of_target)).clamp(min=1e-8) ** gamma
    if weights is not None:
        losses = losses * weights.to(losses.device)[target]
    return torch.where(known, losses, 0.0)


def binary_losses(scores: Tensor, labels: Tensor, *, weights: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """Mean over the labels of the binary cross-entropies of scores [rows, L] against labels [rows, L] of 0 and 1, one
    for each row; 0 where its labels are NaN. `weights` [L] are those of the positive decisions."""
    scores = scores.float()
    known = ~labels.isnan().any(-1)
    target = torch.where(known[:, None], labels.float(), 0.0)
    positive = None if weights is None else weights.to(scores.device)
    losses = F.binary_cross_entropy_with_logits(scores, target, pos_weight=positive, reduction="none")
    if gamma:
        right = torch.where(target > 0.5, scores, -scores)
        losses = losses * torch.sigmoid(-right).clamp(min=1e-8) ** gamma
    return torch.where(known, losses.mean(-1), 0.0)


def number_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared errors [rows] of scores [rows, 1] against labels [rows]; 0 where a label is NaN."""
    known = ~labels.isnan()
    errors = scores.float().squeeze(-1) - torch.where(known, labels.float(), 0.0)
    return torch.where(known, errors**2, 0.0)


def class_distance(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of both Kullback-Leibler divergences [...] between the distributions of scores [..., L]."""
    a, b = first.float().log_softmax(-1), second.float().log_softmax(-1)
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1)


def binary_distance(first: Tensor, second: Tensor) -> Tensor:
    """The same for independent decisions: the mean over the labels [rows] of scores [rows, L]."""
    a, b = first.float(), second.float()
    return 0.5 * ((a.sigmoid() - b.sigmoid()) * (a - b)).mean(-1)


def twice(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every row of a batch two times, so that one forward pass draws two dropouts for each (arXiv 2106.14448).

    Where dropout goes by the numbers of rows, the second ones get numbers of their own.
    """
    place = getattr(model, "dropout_place", None)
    if place is None:  # a model of transformers: everything is drawn from torch's generator
        model.set_dropout(seed=None, rows=None)
    elif place.rows is not None:
        model.set_dropout(seed=place.seed, rows=torch.cat((place.rows, place.rows + SECOND_PASS)))
    return {name: torch.cat((value, value)) for name, value in batch.items()}


def auxiliary(model: Any, known: Tensor, tokens: int) -> Tensor | float:
    """What the model itself adds to the loss (experts), one share for each row that is known [B]; 0 where nothing."""
    labels = torch.full((known.shape[0], tokens), IGNORE, device=known.device)
    labels[:, 0] = torch.where(known, 0, IGNORE)
    added: Tensor | None = model.auxiliary_loss(labels)
    return 0.0 if added is None else added
