"""Tags of words: from entities and back, in the schemes that models learn, and the best sequence that one allows.

L tags, B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainwright.tasks.metrics.entities import Entity, split_tag

__all__ = ["allowed", "best_allowed", "tag_names", "write_tags"]

FORBIDDEN = -1e4
"""Added to a score that cannot be: far below any log-probability, far above what loses fp32's digits."""


def tag_names(types: Iterable[str], scheme: str) -> list[str]:
    """All tags of a scheme ("bio" or "bioes") for these types of entities: O first."""
    letters = "BI" if scheme == "bio" else "BIES"
    return ["O", *(f"{letter}-{kind}" for kind in types for letter in letters)]


def write_tags(entities: Iterable[Entity], words: int, scheme: str = "bio") -> list[str]:
    """Tags of `words` words: IOB2 ("bio"), or IOBES ("bioes"), which tells last and single words apart."""
    tags = ["O"] * words
    for kind, first, last in entities:
        tags[first : last + 1] = [f"I-{kind}"] * (last + 1 - first)
        tags[first] = f"B-{kind}"
        if scheme == "bioes":
            tags[last] = f"E-{kind}" if last > first else f"S-{kind}"
    return tags


def allowed(names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """What may follow what, bool [L, L] from row to column; what may begin and what may end a sentence, bool [L]."""
    read = [split_tag(name) for name in names]
    has_ends = any(letter in "ES" for letter, _ in read)

    def open_(letter: str) -> bool:  # something of the same entity has to follow
        return has_ends and letter in ("B", "I")

    table = torch.zeros(len(names), len(names), dtype=torch.bool)
    for (row, (letter, kind)), (column, (next_letter, next_kind)) in itertools.product(
        enumerate(read), enumerate(read)
    ):
        goes_on = next_letter in ("I", "E")
        if goes_on:
            table[row, column] = letter in ("B", "I") and kind == next_kind
        else:
            table[row, column] = not open_(letter)
    begin = torch.tensor([letter not in ("I", "E") for letter, _ in read])
    end = torch.tensor([not open_(letter) for letter, _ in read])
    return table, begin, end


def best_allowed(scores: Tensor, mask: Tensor, names: Sequence[str], edges: Tensor | None = None) -> Tensor:
    """The most probable tags, int64 [B, T], among the sequences that the scheme allows; 0 where mask is False.

    Args:
        scores: [B, T, L], of each token on its own.
        mask: bool [B, T], the tokens that have a tag; what lies between them is left out.
        edges: [B, 2], whether a row begins and ends its sentence: else an entity may go on there. None: all do.
    """
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    lengths = mask.sum(1)
    links = int(lengths.max()) if lengths.numel() else 0
    found = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    if links == 0:
        return found
    order = order[:, :links]
    log_probs = scores.float().log_softmax(-1)
    log_probs = log_probs.gather(1, order[..., None].expand(-1, -1, log_probs.shape[-1]))
    follow, begin, end = (
        torch.where(part, 0.0, FORBIDDEN).to(log_probs)
        for part in (table.to(scores.device) for table in allowed(names))
    )
    first, last = (
        edge if edges is None else torch.where(edges[:, side, None] > 0, edge, 0.0)
        for side, edge in enumerate((begin, end))
    )
    alive = torch.arange(links, device=mask.device)[None] < lengths[:, None]
    best = log_probs[:, 0] + first
    stay = torch.arange(len(names), device=mask.device).expand_as(best)
    came_from: list[Tensor] = []
    for step in range(1, links):
        highest, previous = (best[:, :, None] + follow).max(dim=1)
        best = torch.where(alive[:, step, None], highest + log_probs[:, step], best)
        came_from.append(torch.where(alive[:, step, None], previous, stay))
    tag = (best + last).argmax(dim=1)
    path = [tag]
    for previous in reversed(came_from):
        tag = previous.gather(1, tag[:, None])[:, 0]
        path.append(tag)
    tags = torch.where(alive, torch.stack(path[::-1], dim=1), 0)
    return found.scatter(1, order, tags)
