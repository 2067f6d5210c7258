"""From logits to the next token, as pure functions over [rows, vocabulary].

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; then one draw. Each filter sees
what the one before it left. Removed tokens get -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.inference.options import GenerationOptions

__all__ = [
    "draw",
    "filter_logits",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
    "scale_temperature",
]

_REMOVED = float("-inf")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make `seen` tokens (bool [rows, vocabulary]) less likely: logit / penalty above zero, logit * penalty below."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and whatever ties with the smallest of them."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, _REMOVED)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities reach p; always the likeliest."""
    ascending, order = logits.sort(dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), _REMOVED)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), _REMOVED)


def filter_logits(logits: Tensor, options: GenerationOptions, seen: Tensor | None = None) -> Tensor:
    """fp32 logits [rows, vocabulary] after every processor that `options` switches on.

    seen: bool, which tokens each row holds already; needed where repetition_penalty is not 1.
    """
    logits = logits.float()
    if options.repetition_penalty != 1.0:
        assert seen is not None, "the caller tracks seen tokens when the penalty is on"
        logits = penalise_repetition(logits, seen, options.repetition_penalty)
    if options.temperature == 0.0:
        return logits
    if options.temperature != 1.0:
        logits = scale_temperature(logits, options.temperature)
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1.0:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0.0:
        logits = keep_min_p(logits, options.min_p)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at `uniforms` [rows] in [0, 1).

    Given the uniforms this is a pure function, so a row's token depends on its own random stream alone.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = logits.to(wide).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[..., -1:]
    target = uniforms.to(device=logits.device, dtype=wide).unsqueeze(-1) * total
    chosen = torch.searchsorted(cumulative, target, right=True)
    # Rounding may push the target onto the total: the last token that has any probability is meant.
    last = (cumulative >= total).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return torch.minimum(chosen, last).squeeze(-1)
