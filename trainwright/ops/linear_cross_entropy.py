"""Cross entropy of a linear head without ever holding all logits.

Logits of N tokens over V words are N x V numbers: at 4096 x 32k in fp32, 512 MB, held several times over by autograd.
Here they are made, used for loss *and* gradient, and dropped, chunk by chunk, in the forward pass (the idea of Liger
Kernel, arXiv 2410.10989). The backward pass only scales what is already there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ModelError

__all__ = [
    "Gradients",
    "LossSums",
    "any_number_of_rows",
    "auto_chunk_tokens",
    "capped",
    "check_shapes",
    "compute_type",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "loss_with_gradients",
]

# Bytes of one chunk of logits that "auto" aims at. Large enough that each product with the head is a full-size matrix
# product and that the fp32 weight gradient is touched rarely; small against the activations of a model with such a
# vocabulary.
_CHUNK_BYTES = {"cpu": 32 << 20, "other": 256 << 20}


class LossSums(NamedTuple):
    """Sums over the tokens that count; whoever normalises divides by `count`. All scalars; only `loss_sum` has a
    gradient.

    loss_sum: what is minimised: cross entropy (with label smoothing) plus the z-loss. fp32 (float64 for float64
    inputs).
    count: int64, tokens whose label is not ignored.
    z_sum: the part of loss_sum that is z-loss.
    nll_sum: -log p(label), no smoothing, no z-loss: exp(nll_sum / count) is the perplexity.
    correct: int64, tokens whose label has the highest logit.
    """

    loss_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # the method tuple.count is not missed
    z_sum: Tensor
    nll_sum: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    compiled: bool = False,
) -> LossSums:
    """Loss sums of logits = hidden [N, D] @ weight [V, D].T + bias [V] against labels [N] int64, `chunk_tokens` rows at
    a time.

    Per counted token: (1 - label_smoothing) * -log p(label) + label_smoothing * mean over words of -log p(word)
    + z_loss * logsumexp^2 (PaLM, arXiv 2204.02311). softcap c: logits become c * tanh(logits / c) (Gemma 2).
    chunk_tokens: default `auto_chunk_tokens`. Products run in the autocast dtype if autocast is on, else in the dtype
    of hidden; softmax statistics are fp32 and the gradient of the weight is summed in fp32. Gradients are made in the
    forward pass, in memory of hidden and weight; with torch.no_grad() none are. compiled: what lies between the
    products runs under torch.compile, one graph for chunks of any number of tokens. Raises ModelError when the shapes
    do not fit.
    """
    check_shapes("linear_cross_entropy", hidden, weight, labels, bias)
    compute = compute_type(hidden)
    if chunk_tokens is None:
        chunk_tokens = auto_chunk_tokens(hidden.shape[0], weight.shape[0], compute, hidden.device.type)
    options = _Options(ignore_index, label_smoothing, z_loss, chunk_tokens, softcap, compute, compiled)
    return loss_with_gradients(partial(_forward, labels=labels, options=options), hidden, weight, bias)


def check_shapes(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """ModelError unless hidden [N, D], weight [V, D], labels [N] and bias [V] go together."""
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and labels.shape == hidden.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        with_bias = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ModelError(
            f"{name} got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"labels {tuple(labels.shape)}{with_bias}",
            hint="hidden is [tokens, width], weight [vocabulary, width], labels [tokens], bias [vocabulary]",
        )


def compute_type(hidden: Tensor) -> torch.dtype:
    """The dtype in which products with `hidden` run: the autocast dtype where autocast is on."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def auto_chunk_tokens(tokens: int, vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens of a chunk: as many as give 32 MiB of logits on CPU (256 MiB elsewhere), equal chunks, multiples of 64."""
    budget = _CHUNK_BYTES["cpu" if device_type == "cpu" else "other"]
    most = max(64, budget // (vocabulary * dtype.itemsize))
    chunks = max(1, -(-tokens // most))
    each = -(-tokens // chunks)
    return max(1, min(tokens, -(-each // 64) * 64))


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Computation = Callable[..., tuple[LossSums, Gradients]]
"""(hidden, weight, bias, wanted=) -> the sums, and those gradients in the three that are wanted."""


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    chunk_tokens: int
    softcap: float | None
    compute: torch.dtype
    compiled: bool


def loss_with_gradients(compute: Computation, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> LossSums:
    """What `compute(hidden, weight, bias, wanted=)` returns, its gradients given to autograd.

    compute: returns the sums and, where wanted, the gradients of loss_sum in hidden, weight and bias.
    """
    trained = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    if not (torch.is_grad_enabled() and trained):
        return compute(hidden, weight, bias, wanted=(False, False, False))[0]
    return LossSums(*_LossWithGradients.apply(hidden, weight, bias, compute))


class _LossWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: Computation
    ) -> tuple[Tensor, ...]:
        sums, gradients = compute(hidden, weight, bias, wanted=tuple(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in saved), None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    options: _Options,
    wanted: tuple[bool, bool, bool],
) -> tuple[LossSums, Gradients]:
    """Loss sums and, where wanted, gradients of loss_sum in hidden (compute dtype), weight and bias (fp32)."""
    wide = torch.promote_types(options.compute, torch.float32)
    statistics = _compiled_statistics() if options.compiled else _statistics
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        narrow, head = hidden.to(options.compute), weight.to(options.compute)
        addend = None if bias is None else bias.to(options.compute)
        hidden_grad = torch.empty_like(narrow) if wanted[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
        rows = []
        for start in range(0, hidden.shape[0], options.chunk_tokens):
            inside = slice(start, start + options.chunk_tokens)
            chunk = narrow[inside]
            raw = chunk @ head.t() if addend is None else torch.addmm(addend, chunk, head.t())
            targets = torch.where(labels[inside] != options.ignore_index, labels[inside], 0)
            tokens = torch.arange(len(targets), device=targets.device)
            chosen = raw[tokens, targets]
            counts = (labels[inside] != options.ignore_index).to(wide)
            if options.compiled:
                any_number_of_rows(raw, chosen, counts)
            row_sums, logits_grad, chosen_grad = statistics(
                raw, chosen, counts, options.label_smoothing, options.z_loss, options.softcap, any(wanted)
            )
            rows.append(row_sums)
            if any(wanted):
                # Not scatter_: on CPU that copies all of a bf16 tensor, twice.
                logits_grad[tokens, targets] = chosen_grad
            if hidden_grad is not None:
                torch.mm(logits_grad, head, out=hidden_grad[inside])
            if weight_grad is not None:
                weight_grad += logits_grad.t() @ chunk
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0, dtype=wide)
        total = torch.cat(rows, 1).sum(1) if rows else torch.zeros(4, dtype=wide, device=hidden.device)
    loss_sum, z_sum, nll_sum, correct = total.unbind()
    count = (labels != options.ignore_index).sum()
    sums = LossSums(loss_sum, count, z_sum, nll_sum, correct.to(torch.int64))
    return sums, (hidden_grad, weight_grad, bias_grad)


def _statistics(
    raw: Tensor,
    raw_chosen: Tensor,
    counts: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token of one chunk of logits [tokens, V]: loss, z-loss, nll, hit, stacked [4, tokens]; and gradients.

    The gradients: that of the loss in all logits *as if no word were the label*, in the dtype of raw, and the full
    one in the logit of the label, to be written over it. (Subtracting 1 from an already rounded probability would
    lose the small gradients of confident tokens.)
    """
    wide = counts.dtype
    logits, chosen = capped(raw.to(wide), softcap), capped(raw_chosen.to(wide), softcap)
    highest = logits.amax(-1, keepdim=True)
    logsumexp = highest + (logits - highest).exp().sum(-1, keepdim=True).log()
    flat = logsumexp[:, 0]
    nll = flat - chosen
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (flat - logits.mean(-1))
    z = z_loss * flat.square()
    hit = (chosen >= highest[:, 0]).to(wide)
    sums = torch.stack((loss + z, z, nll, hit)) * counts
    if not with_grad:
        return sums, raw, raw_chosen
    softmax_weight = 1 + 2 * z_loss * logsumexp
    uniform = label_smoothing / raw.shape[1]
    grad = ((logits - logsumexp).exp() * softmax_weight - uniform) * counts[:, None]
    chosen_grad = ((chosen - flat).exp() * softmax_weight[:, 0] - uniform - (1 - label_smoothing)) * counts
    if softcap is not None:
        grad = grad * (1 - (logits / softcap).square())
        chosen_grad = chosen_grad * (1 - (chosen / softcap).square())
    return sums, grad.to(raw.dtype), chosen_grad.to(raw.dtype)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), where there is one (Gemma 2)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@lru_cache(maxsize=1)
def _compiled_statistics() -> Any:
    return torch.compile(_statistics, dynamic=False)


def any_number_of_rows(*tensors: Tensor) -> None:
    """Tell the compiler that the first size of these is not a constant: how many tokens are trained differs from batch
    to batch, and after eight shapes it would compile no more. From the first call on, so that the bits of a result do
    not depend on which shape came first."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
) -> LossSums:
    """The same by torch's own cross_entropy over all logits, in at least fp32, with autograd doing the gradient."""
    del chunk_tokens
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(wide) @ weight.to(wide).t()
        if bias is not None:
            logits = logits + bias.to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        counted = labels != ignore_index
        smooth = F.cross_entropy(
            logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )
        nll = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
        z_sum = z_loss * (torch.logsumexp(logits, -1).square() * counted).sum()
        correct = ((logits.argmax(-1) == labels) & counted).sum()
    return LossSums(smooth + z_sum, counted.sum(), z_sum.detach(), nll.detach(), correct)
