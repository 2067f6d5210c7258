"""Cross entropy of a linear head whose vocabulary is divided over processes, without ever holding all logits.

Each process has some rows of the head and so some columns of the logits. What a token's loss needs of the others is
four numbers from each: the maximum of its logits, their sum of exponentials, the label's logit (zero where the label is
elsewhere) and their plain sum. Those are exchanged once per chunk; no logit travels (Megatron-LM, arXiv 1909.08053,
section 3). Chunks and the gradients made in the forward pass are those of `linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.ops.linear_cross_entropy import (
    Gradients,
    LossSums,
    any_number_of_rows,
    auto_chunk_tokens,
    capped,
    check_shapes,
    compute_type,
    loss_with_gradients,
)

__all__ = ["VocabularyPart", "vocab_parallel_cross_entropy"]


class VocabularyPart(NamedTuple):
    """Which words one process has, and how it hears of the others.

    Attributes:
        first: number of its first word; it has as many as its part of the head has rows.
        total: words of the whole vocabulary.
        parts: processes that share it.
        gather: [4, N] -> [parts, 4, N], what all processes passed, in their order and the same on each; a collective.
    """

    first: int
    total: int
    parts: int
    gather: Callable[[Tensor], Tensor]


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: VocabularyPart,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    compiled: bool = False,
) -> LossSums:
    """`linear_cross_entropy` of hidden [N, D] and labels [N], the same on all processes, with a part of the head.

    weight [rows, D] and bias [rows] are the words `part.first` to `part.first + rows` of the head. The sums are those
    of the whole vocabulary and equal on all processes; the gradients of weight and bias are complete, that of `hidden`
    is this process's part of it: the parts still have to be summed over the processes. Raises ModelError when the
    shapes do not fit.
    """
    check_shapes("vocab_parallel_cross_entropy", hidden, weight, labels, bias)
    if part.first < 0 or part.first + weight.shape[0] > part.total:
        raise ModelError(f"words {part.first} to {part.first + weight.shape[0]} are not among the {part.total}")
    compute = compute_type(hidden)
    if chunk_tokens is None:
        widest = -(-part.total // part.parts)  # the same on all processes: they exchange chunk by chunk
        chunk_tokens = auto_chunk_tokens(hidden.shape[0], widest, compute, hidden.device.type)
    options = _Options(ignore_index, label_smoothing, z_loss, chunk_tokens, softcap, compute, compiled)
    return loss_with_gradients(partial(_forward, labels=labels, part=part, options=options), hidden, weight, bias)


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    chunk_tokens: int
    softcap: float | None
    compute: torch.dtype
    compiled: bool


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    part: VocabularyPart,
    options: _Options,
    wanted: tuple[bool, bool, bool],
) -> tuple[LossSums, Gradients]:
    """Loss sums and, where wanted, gradients of loss_sum in hidden (compute dtype), weight and bias (fp32)."""
    wide = torch.promote_types(options.compute, torch.float32)
    summarise, derive = _compiled() if options.compiled else (_summary, _gradients)
    rows = weight.shape[0]
    counted = labels != options.ignore_index
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow, head = hidden.to(options.compute), weight.to(options.compute)
        addend = None if bias is None else bias.to(options.compute)
        hidden_grad = torch.empty_like(narrow) if wanted[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
        totals = []
        for start in range(0, hidden.shape[0], options.chunk_tokens):
            inside = slice(start, start + options.chunk_tokens)
            chunk = narrow[inside]
            raw = chunk @ head.t() if addend is None else torch.addmm(addend, chunk, head.t())
            own = labels[inside] - part.first
            here = counted[inside] & (own >= 0) & (own < rows)
            targets = torch.where(here, own, 0)
            tokens = torch.arange(len(targets), device=targets.device)
            chosen = raw[tokens, targets]
            own_labels, counts = here.to(wide), counted[inside].to(wide)
            if options.compiled:
                any_number_of_rows(raw, chosen, own_labels, counts)
            gathered = part.gather(summarise(raw, chosen, own_labels, options.softcap))
            merged = _merge(gathered, counts, part.total, options)
            if options.compiled:
                any_number_of_rows(merged.logsumexp)
            totals.append(merged.sums)
            if not any(wanted):
                continue
            grad, chosen_grad = derive(raw, chosen, merged.logsumexp, counts, part.total, options)
            # Written over, not subtracted from: 1 minus a rounded probability would lose confident tokens' gradients.
            grad[tokens, targets] = torch.where(here, chosen_grad, grad[tokens, targets])
            if hidden_grad is not None:
                torch.mm(grad, head, out=hidden_grad[inside])
            if weight_grad is not None:
                weight_grad += grad.t() @ chunk
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=wide)
        total = torch.cat(totals, 1).sum(1) if totals else torch.zeros(4, dtype=wide, device=hidden.device)
    loss_sum, z_sum, nll_sum, correct = total.unbind()
    sums = LossSums(loss_sum, counted.sum(), z_sum, nll_sum, correct.to(torch.int64))
    return sums, (hidden_grad, weight_grad, bias_grad)


def _summary(raw: Tensor, raw_chosen: Tensor, here: Tensor, softcap: float | None) -> Tensor:
    """What the other processes need of this one's logits [tokens, rows], per token, stacked [4, tokens].

    Maximum, sum of exponentials relative to it, the label's logit or zero, and the sum.
    """
    logits, chosen = capped(raw.to(here.dtype), softcap), capped(raw_chosen.to(here.dtype), softcap)
    highest = logits.amax(-1)
    exponentials = (logits - highest[:, None]).exp().sum(-1)
    return torch.stack((highest, exponentials, chosen * here, logits.sum(-1)))


class _Merged(NamedTuple):
    """logsumexp [tokens] over the whole vocabulary; sums [4, tokens]: loss, z-loss, nll and hits."""

    logsumexp: Tensor
    sums: Tensor


def _merge(gathered: Tensor, counts: Tensor, words: int, options: _Options) -> _Merged:
    highest_of, exponentials_of, chosen_of, sum_of = gathered.unbind(1)
    highest = highest_of.amax(0)
    logsumexp = highest + (exponentials_of * (highest_of - highest).exp()).sum(0).log()
    chosen = chosen_of.sum(0)  # zero on all processes but the label's
    nll = logsumexp - chosen
    loss = nll
    if options.label_smoothing:
        smooth = logsumexp - sum_of.sum(0) / words
        loss = (1 - options.label_smoothing) * nll + options.label_smoothing * smooth
    z = options.z_loss * logsumexp.square()
    hit = (chosen >= highest).to(counts.dtype)
    return _Merged(logsumexp, torch.stack((loss + z, z, nll, hit)) * counts)


def _gradients(
    raw: Tensor, raw_chosen: Tensor, logsumexp: Tensor, counts: Tensor, words: int, options: _Options
) -> tuple[Tensor, Tensor]:
    """The gradient of the loss in all logits here as if no word were the label, and that in the label's logit."""
    wide = counts.dtype
    logits, chosen = capped(raw.to(wide), options.softcap), capped(raw_chosen.to(wide), options.softcap)
    softmax_weight = 1 + 2 * options.z_loss * logsumexp
    uniform = options.label_smoothing / words
    grad = ((logits - logsumexp[:, None]).exp() * softmax_weight[:, None] - uniform) * counts[:, None]
    chosen_grad = (chosen - logsumexp).exp() * softmax_weight - uniform - (1 - options.label_smoothing)
    chosen_grad = chosen_grad * counts
    if options.softcap is not None:
        grad = grad * (1 - (logits / options.softcap).square())
        chosen_grad = chosen_grad * (1 - (chosen / options.softcap).square())
    return grad.to(raw.dtype), chosen_grad.to(raw.dtype)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any]:
    return torch.compile(_summary, dynamic=False), torch.compile(_gradients, dynamic=False)
