"""A linear-chain conditional random field over the scores of tokens (Lafferty et al. 2001; Lample et al. 2016, arXiv
1603.01360): how likely a whole sequence of tags is, and which is the likeliest.

The chain runs over the labelled positions alone: what lies between them (the later pieces of a word, padding) is left
out, as if it were not there. All sums are kept as logarithms in fp32. B batch, T tokens, K links of the chain, L tags.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.ops.contents import has_contents

__all__ = ["LinearChainCRF"]

IGNORE = -100


class LinearChainCRF(nn.Module):
    """Scores of neighbouring tags: `transitions` [L, L] from row to column, `start` [L] and `end` [L] of a chain."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(tags, tags))
        self.start = nn.Parameter(torch.zeros(tags))
        self.end = nn.Parameter(torch.zeros(tags))

    def loss_sum(self, scores: Tensor, tags: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum over the rows of -log p(tags of the row | scores), number of labelled positions).

        scores [B, T, L]; tags int64 [B, T], -100 at positions that are not in the chain; mask bool [B, T]: False takes
        out more. A row without labelled positions adds nothing.

        Raises:
            ModelError: the shapes do not fit.
        """
        sums: tuple[Tensor, Tensor] = self(scores, tags, mask)
        return sums

    def decode(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The likeliest tags, int64 [B, T], of the positions where mask [B, T] is True; -100 elsewhere (Viterbi)."""
        with torch.no_grad():
            tags: Tensor = self(scores, None, mask)
        return tags

    def forward(self, scores: Tensor, tags: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        """`loss_sum` with tags, `decode` without: one door, so that who divides parameters has one place to stand."""
        if (tags is None and mask is None) or scores.shape[-1] != self.start.shape[0]:
            raise ModelError(f"a CRF of {self.start.shape[0]} tags got scores {tuple(scores.shape)}")
        labelled = scores.new_ones(scores.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if tags is not None:
            labelled = labelled & (tags != IGNORE)
        if labelled.shape != scores.shape[:2]:
            raise ModelError(f"scores {tuple(scores.shape)} with tags or mask {tuple(labelled.shape)}")
        wide = torch.promote_types(scores.dtype, torch.float32)
        with torch.autocast(scores.device.type, enabled=False):
            order, lengths = _chain(labelled)
            links = scores.to(wide).gather(1, order[..., None].expand(-1, -1, scores.shape[-1]))
            weights = self.transitions.to(wide), self.start.to(wide), self.end.to(wide)
            if tags is None:
                best = _viterbi(links, lengths, *weights)
                found = torch.full_like(labelled, IGNORE, dtype=torch.int64)
                best = torch.where(_inside(lengths, best.shape[1]), best, IGNORE)
                return found.scatter(1, order, best)
            chain_tags = tags.gather(1, order).clamp(min=0)
            log_z = _forward_algorithm(links, lengths, *weights)
            loss = log_z - _path_score(links, chain_tags, lengths, *weights)
            return torch.where(lengths > 0, loss, 0.0).sum(), labelled.sum()


def _chain(labelled: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled positions of each row in front, [B, K], and how many there are, [B]."""
    lengths = labelled.sum(1)
    order = labelled.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    longest = labelled.shape[1]
    if has_contents(lengths) and lengths.numel():
        longest = max(1, int(lengths.max()))
    return order[:, :longest], lengths


def _inside(lengths: Tensor, links: int) -> Tensor:
    return torch.arange(links, device=lengths.device)[None] < lengths[:, None]


def _forward_algorithm(links: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """log of the sum over all sequences of tags of exp(their score), [B]."""
    alive = _inside(lengths, links.shape[1])
    alpha = start + links[:, 0]
    for step in range(1, links.shape[1]):
        onward = torch.logsumexp(alpha[:, :, None] + transitions, dim=1) + links[:, step]
        alpha = torch.where(alive[:, step, None], onward, alpha)
    return torch.logsumexp(alpha + end, dim=1)


def _path_score(
    links: Tensor, tags: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """The score of the given tags [B, K], [B]."""
    alive = _inside(lengths, links.shape[1])
    emitted = (links.gather(2, tags[..., None])[..., 0] * alive).sum(1)
    moved = (transitions[tags[:, :-1], tags[:, 1:]] * alive[:, 1:]).sum(1)
    last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    return start[tags[:, 0]] + emitted + moved + end[last]


def _viterbi(links: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The sequence of tags with the highest score, [B, K]; what lies behind a row's chain has no meaning."""
    alive = _inside(lengths, links.shape[1])
    best = start + links[:, 0]
    same = torch.arange(links.shape[2], device=links.device).expand_as(best)
    came_from = []
    for step in range(1, links.shape[1]):
        highest, previous = (best[:, :, None] + transitions).max(dim=1)
        best = torch.where(alive[:, step, None], highest + links[:, step], best)
        came_from.append(torch.where(alive[:, step, None], previous, same))
    tag = (best + end).argmax(dim=1)
    path = [tag]
    for previous in reversed(came_from):
        tag = previous.gather(1, tag[:, None])[:, 0]
        path.append(tag)
    return torch.stack(path[::-1], dim=1)
