"""What is proven of a transformers model by running it, before the first use: it holds for its code, not for its name.

A forward pass over a few tokens, without gradients and without dropout. Where parameters are divided over ranks, all of
them come here at the same moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.hugging_face.head import standing_in
from trainwright.models.hugging_face.inputs import PACKINGS, Packing

if TYPE_CHECKING:
    from trainwright.models.hugging_face.model import HuggingFaceModel

__all__ = ["find_packing", "prove_tail"]

_TOKENS = 16  # of a document; fp8 products take multiples of 16


def prove_tail(model: HuggingFaceModel) -> None:
    """Compare what happens behind the output projection with what is known of it.

    Raises:
        ModelError: the model does something else to its logits.
    """
    name = model.__dict__["projection_name"]
    if name is None or model.config.head is not None:
        return
    words, device = model.head_weight.shape[0], model.embedding.weight.device
    given = torch.linspace(-3.0, 3.0, _TOKENS * words, device=device).view(1, _TOKENS, words)
    ids = _probe_ids(model, seed=1)
    named: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        named["decoder_input_ids"] = ids
    with _resting(model), standing_in(model, name, lambda hidden: given):
        output = model.run(named)
    if not torch.allclose(output.logits.float(), model.tail(given, model).float(), rtol=1e-5, atol=1e-5):
        raise ModelError(
            f"{type(model).__name__} changes its logits behind the output projection in a way that is not known",
            hint="use another architecture; a factor, a cap and a bias are known",
        )


def find_packing(model: HuggingFaceModel) -> Packing | str:
    """How documents of one row are told apart, so that neither sees the other and each gives what it gives alone; or
    the reason why no way does it."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder has no such rows"
    reasons: list[str] = []
    with _resting(model):
        for packing in PACKINGS:
            if packing.positions and "position_ids" not in model.__dict__["accepted"]:
                continue
            if packing.mask != "none" and any(model.config.layer_windows()):
                reasons.append("a mask of documents would take the place of its sliding windows")
                continue
            problem = _problem_of(model, packing)
            if problem is None:
                return packing
            reasons.append(problem)
    return reasons[0] if reasons else "it takes no positions and no mask"


def _problem_of(model: HuggingFaceModel, packing: Packing) -> str | None:
    """What is wrong with one way, seen on two documents in a row; None if nothing is."""
    first, other, second = (_probe_ids(model, seed=seed) for seed in (1, 2, 3))
    documents = torch.arange(2, device=first.device).repeat_interleave(_TOKENS)[None]
    positions = torch.arange(_TOKENS, device=first.device).repeat(2)[None]
    named = model.packed(packing, positions, documents)
    try:
        rows = [torch.cat((before, second), 1) for before in (first, other)]
        outputs = [model.until_projection({"input_ids": row, **named})[:, _TOKENS:] for row in rows]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"{type(error).__name__} under a mask of documents"
    if not torch.equal(*outputs):  # masked scores are zeros: not a bit may change
        return "what stands in one document changes the next"
    alone = model.until_projection({"input_ids": second})
    return None if _near(outputs[0], alone) else "a document in a row does not give what it gives alone"


def _probe_ids(model: HuggingFaceModel, *, seed: int) -> Tensor:
    words = model.config.vocab_size
    ids = torch.randint(0, words, (1, _TOKENS), generator=torch.Generator().manual_seed(seed))
    padding = model.config.values.get("pad_token_id")
    if padding is not None:  # positions of some models count tokens that are not padding
        ids = torch.where(ids == padding, (ids + 1) % words, ids)
    return ids.to(model.embedding.weight.device)


@contextlib.contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped out, no gradient is kept, and products run in the type of the parameters."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        model.train(training)


def _near(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == torch.float32 else 5e-2
    scale = float(other.abs().max().clamp_min(1e-12))
    return float((one.float() - other.float()).abs().max()) <= tolerance * scale
