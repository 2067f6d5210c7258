"""Continuing prompts with a transformers model, by its own `generate`: its caches, its encoders, its beams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainwright.models.hugging_face.library import generation_options
from trainwright.models.hugging_face.model import HuggingFaceModel

__all__ = ["write_with_transformers"]


def write_with_transformers(
    model: HuggingFaceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    beams: int,
    vocab_size: int,
    length_penalty: float,
    seed: int,
) -> list[list[int]]:
    """What a decoder writes behind each of these prompts, or an encoder-decoder for them; stop token included.

    Sampling draws from one generator for all rows of a call.
    """
    device = model.embedding.weight.device
    reads = bool(model.config.is_encoder_decoder)
    ids, mask = _padded(prompts, at_end=reads)
    width = 0 if reads else ids.shape[1]
    hidden_words = range(vocab_size, model.config.vocab_size)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "num_beams": beams,
        "length_penalty": length_penalty,
        "eos_token_id": list(stop_ids) or None,
        "pad_token_id": model.padding_id,
        "bos_token_id": model.config.values.get("bos_token_id"),
        "suppress_tokens": list(hidden_words) or None,
        "use_cache": True,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0}
    if reads:
        options["decoder_start_token_id"] = model.decoder_start_id
        width = 1
    with model.as_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        written: Tensor = model.theirs.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=generation_options(**options)
        )
    return [_until_stop(row, stop_ids) for row in written[:, width:].tolist()]


def _padded(prompts: Sequence[Sequence[int]], *, at_end: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and which of them are real, padded before what is continued, behind what is read."""
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if at_end else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(list(prompt))
        mask[row, place] = 1
    return ids, mask


def _until_stop(written: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(written):
        if token in stop_ids:
            return list(written[: place + 1])
    return list(written)
