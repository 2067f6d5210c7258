"""NEFTune (Jain et al., arXiv 2310.05914): uniform noise on the embedded tokens while a model is fine-tuned.

A token's noise is uniform in [-1, 1) times alpha / sqrt(L D), with L the real tokens of its text and D the width. As
dropout's masks it is a pure function of the step's seed, the row of the global batch, document, position and feature,
so that micro-batches and ranks add the same, whoever computes which part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.seeds import derive_seed
from trainwright.models.backbone import Backbone
from trainwright.models.dropout import DropoutPlace, Sited, join_place
from trainwright.ops.dropout import uniform

__all__ = ["SECOND_PASS", "EmbeddingNoise", "attach_embedding_noise"]

NAME = "embedding_noise"

SECOND_PASS = 1 << 40
"""Added to the numbers of rows that go through a model a second time in one pass (R-Drop): beyond any batch."""


class EmbeddingNoise(Sited):
    """What is added to embedded tokens [B, T, D] in training.

    Who trains calls `see` with the whole rows of each step. Without it every text is taken to be as long as its row.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__(p=alpha)
        self.alpha = alpha
        self.listening = True
        self._lengths: Tensor | None = None
        self._first_row = 0

    def see(self, batch: Mapping[str, Tensor], place: int = 0) -> None:
        """The rows of the coming step on this rank, not cut into parts of sequences: how long each text is.

        Args:
            batch: `input_ids` [B, T], and `document_ids` [B, T], `lengths` [B] or `key_mask` [B, T].
            place: this rank holds the part of that number of the global batch, all parts being equally large.
        """
        self._lengths = lengths_of(batch)
        self._first_row = place * batch["input_ids"].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.listening:
            return x
        place = self.place
        keys = self.keys()
        if place is None or keys is None or place.rows is None:
            return x + self._scaled(torch.rand_like(x, dtype=torch.float32) * 2 - 1, x.shape[1]).to(x.dtype)
        lengths = place.part(self._lengths_of_tokens(place, keys), x.shape[1])
        features = torch.arange(x.shape[-1], device=x.device)
        return x + self._scaled(uniform(place.part(keys, x.shape[1]), features), lengths).to(x.dtype)

    def _scaled(self, noise: Tensor, lengths: Tensor | int) -> Tensor:
        if isinstance(lengths, int):
            return noise * (self.alpha / (lengths * noise.shape[-1]) ** 0.5)
        return noise * (self.alpha / (lengths.clamp(min=1) * noise.shape[-1]).float().sqrt())[..., None]

    def _lengths_of_tokens(self, place: DropoutPlace, keys: Tensor) -> Tensor:
        """int64 [B, T]: how many real tokens the text of each token has."""
        if self._lengths is None or place.rows is None:
            return torch.full_like(keys, keys.shape[1])
        table = self._lengths.to(keys.device)[place.rows % SECOND_PASS - self._first_row]
        documents = place.documents
        if table.shape[1] == 1 or documents is None:
            return table[:, :1].expand(keys.shape)
        return table.gather(1, documents.long())


def lengths_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of each text, int64: [B, 1], or [B, documents] by number where rows hold several."""
    ids, documents = batch["input_ids"], batch.get("document_ids")
    if documents is not None:
        numbers = documents.long()
        counts = torch.zeros(ids.shape[0], int(numbers.max()) + 1, dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(1, numbers, torch.ones_like(numbers))
    if "lengths" in batch:
        return batch["lengths"].long()[:, None]
    mask = batch.get("key_mask")
    if mask is not None:
        return mask.long().sum(1, keepdim=True)
    return torch.full((ids.shape[0], 1), ids.shape[1], dtype=torch.int64, device=ids.device)


def attach_embedding_noise(model: nn.Module, alpha: float) -> EmbeddingNoise:
    """Add noise behind the token embedding of a model, native or of transformers, that is divided already.

    Nothing happens on a stage of a pipeline that has no embedding. Of an encoder-decoder the text that is read gets the
    noise.
    """
    noise = EmbeddingNoise(alpha)
    model.add_module(NAME, noise)
    noise.train(model.training)
    embedding = _embedding(model)
    if embedding is None:
        return noise
    embedding.register_forward_hook(lambda module, arguments, output: noise(output))
    if not isinstance(model, Backbone):
        _tell_rows(model, noise, embedding)
    if _has_encoder(model):
        _only_in_encoder(model, noise)
    return noise


def _embedding(model: Any) -> nn.Module | None:
    """What embeds the text that is read; None where another stage of a pipeline has it."""
    try:
        found = model.get_encoder().get_input_embeddings() if _has_encoder(model) else model.embedding
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _tell_rows(model: Any, noise: EmbeddingNoise, embedding: nn.Module) -> None:
    """Let a model that leaves dropout to torch's generator pass on which rows it sees; positions are those in the
    row."""
    place = DropoutPlace()
    inner = model.set_dropout

    def set_dropout(*, seed: int | None, rows: Tensor | None) -> None:
        inner(seed=seed, rows=rows)
        if rows is not None:
            join_place(noise, place, rows.device)
            noise.site = torch.tensor(derive_seed("dropout", NAME), device=rows.device)
        place.set(seed, rows)

    def locate(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        ids = arguments[0]
        if noise.training and noise.listening:
            place.locate(torch.arange(ids.shape[1], device=ids.device), None)

    model.__dict__["set_dropout"] = set_dropout
    embedding.register_forward_pre_hook(locate)


def _only_in_encoder(model: Any, noise: EmbeddingNoise) -> None:
    """Encoder and decoder may share one embedding."""
    noise.listening = False

    def begin(module: nn.Module, arguments: Any) -> None:
        noise.listening = True

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        noise.listening = False

    encoder = model.get_encoder()
    encoder.register_forward_pre_hook(begin)
    encoder.register_forward_hook(end, always_call=True)
