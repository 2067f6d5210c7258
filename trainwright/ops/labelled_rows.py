"""Leaving out what no loss is taken of: the head is a seventh of a small model's work, and chats train a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.ops.contents import has_contents

__all__ = ["labelled_rows"]


def labelled_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of hidden [N, D] whose label [N] is not -100, in their order, and their labels: of masked language
    modelling 15 %, of chats what the assistant writes.

    Their number is rounded up to a sixteenth of N (with unlabelled rows), so that few shapes occur. Where that is N,
    and where labels have no contents (a dry run), the arguments themselves come back. Waits for the device of the
    labels.
    """
    count = labels.shape[0]
    if not has_contents(labels) or count < 64:
        return hidden, labels
    step = -(-count // 16)
    chosen = int((labels != -100).sum())
    wanted = min(count, -(-max(chosen, 1) // step) * step)
    if wanted == count:
        return hidden, labels
    order = (labels == -100).to(torch.int8).argsort(stable=True)[:wanted]
    return hidden[order], labels[order]
