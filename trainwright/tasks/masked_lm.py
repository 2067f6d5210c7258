"""Masked language modelling: predict tokens that were hidden, from both sides (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.config.tasks import MaskedLMSection
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models import Backbone, Decoder
from trainwright.tasks.masking import Masking, Pieces, word_table
from trainwright.tasks.task import LossOutput, Metric

__all__ = ["MaskedLM"]

Arrays = dict[str, NDArray[Any]]


class MaskedLM:
    """Prediction of hidden tokens of running text.

    `prepare_batch` hides them: anew in every epoch of training, and the same ones in every evaluation, because a row's
    mask depends on the seed and its draw number alone.

    Args:
        section: what is hidden, and how much.
        seed: of the masks.
        compiled: compile the statistics of the loss, as the blocks of the model are.

    Raises:
        ConfigError: the tokenizer has no token that hides.
    """

    name = "masked_lm"
    best = Metric()
    head = None

    def __init__(
        self, section: MaskedLMSection, tokenizer: Tokenizer, *, seed: int = 0, compiled: bool = False
    ) -> None:
        self.section = section
        self.seed = seed
        self.compiled = compiled
        mask_id = tokenizer.special_id("mask")
        if mask_id is None:
            raise ConfigError(
                "task masked_lm hides tokens, but the tokenizer has no token for that (no role `mask`)",
                hint="data.tokenizer={train: wordpiece} makes [MASK]; to another add a special token [MASK] or <mask>",
            )
        special = np.zeros(tokenizer.vocab_size, dtype=bool)
        special[sorted(tokenizer.special_ids)] = True
        special[[one for role in tokenizer.special if (one := tokenizer.special_id(role)) is not None]] = True
        known = np.asarray([tokenizer.token(index) is not None for index in range(tokenizer.vocab_size)])
        self._masking = Masking(
            section.masking,
            section.mask_share,
            mask_id,
            np.flatnonzero(known & ~special),
            special,
            word_table(tokenizer),
        )
        self._pad_id = next((one for one in (tokenizer.pad_id, tokenizer.eos_id) if one is not None), 0)
        self._first_id = _either(tokenizer.special_id("cls"), tokenizer.bos_id)
        self._last_id = _either(tokenizer.special_id("sep"), tokenizer.eos_id)

    # --- batches ---

    def prepare_batch(self, arrays: Arrays, draws: NDArray[np.integer]) -> Arrays:
        """The batch of running text with tokens hidden; `labels` are the tokens themselves, where they are predicted.

        What a `TokenDataset` gives as labels (the next tokens) is only looked at to find padding. Where padding is not
        apart as a document of its own, `key_mask` hides it.

        Args:
            draws: of each row, what its mask depends on beside the seed.
        """
        pieces = Pieces.of(arrays, self._pad_id)
        ids = np.asarray(arrays["input_ids"], dtype=np.int64)
        if self.section.frame:
            ids = self._framed(ids, pieces)
        inputs, labels = self._masking.hide(ids, pieces, np.asarray(draws, dtype=np.int64), self.seed)
        changed = {**arrays, "input_ids": inputs, "labels": labels}
        if "document_ids" not in arrays and not pieces.real.all():
            changed["key_mask"] = pieces.real
        return changed

    def _framed(self, ids: NDArray[np.int64], pieces: Pieces) -> NDArray[np.int64]:
        """Every stretch of text that has no beginning or end token yet gets one, and gives up its last tokens for it.

        Stretches of fewer than 4 tokens are left alone.
        """
        number = np.cumsum(pieces.first.ravel()) - 1
        flat, real = ids.ravel(), pieces.real.ravel()
        begins, ends = np.flatnonzero(pieces.first.ravel()), np.flatnonzero(pieces.last.ravel())
        if not len(begins):
            return ids
        long = ends - begins >= 3
        out = flat.copy()
        if self._first_id is not None:
            shifted = long & (flat[begins] != self._first_id)
            slots = np.flatnonzero(real & shifted[np.maximum(number, 0)])
            out[slots] = flat[np.maximum(slots - 1, 0)]
            out[begins[shifted]] = self._first_id
        if self._last_id is not None:
            out[ends[long]] = self._last_id
        return out.reshape(ids.shape)

    # --- losses ---

    def loss(self, model: Backbone, batch: Mapping[str, Tensor]) -> LossOutput:
        """Cross-entropy of the predicted tokens in nats, with label smoothing where it is on.

        Raises:
            ModelError: the model reads from left to right.
        """
        return self._sums(model, batch, self.section.label_smoothing)

    def evaluate(self, model: Backbone, batch: Mapping[str, Tensor]) -> LossOutput:
        """Plain cross-entropy in nats."""
        return self._sums(model, batch, 0.0)

    def _sums(self, model: Backbone, batch: Mapping[str, Tensor], label_smoothing: float) -> LossOutput:
        if isinstance(model, Decoder):
            raise ModelError(
                f"{type(model).__name__} reads from left to right; hidden tokens are predicted from both sides",
                hint="use an encoder (model.preset=bert-mini, ...), or task=causal_lm",
            )
        hidden = model.hidden_states_of(batch)
        sums = model.head_loss(
            hidden.flatten(0, 1), batch["labels"].flatten(), label_smoothing=label_smoothing, compiled=self.compiled
        )
        return LossOutput(loss_sum=sums.loss_sum, count=sums.count)


def _either(one: int | None, other: int | None) -> int | None:
    return other if one is None else one
