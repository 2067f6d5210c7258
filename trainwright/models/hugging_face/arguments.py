"""What a transformers model is given for a batch: masks, positions, packed rows, and what an encoder-decoder writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.hugging_face.inputs import Packing, packed_inputs, packing_refused, positions_in
from trainwright.models.hugging_face.proofs import find_packing
from trainwright.models.task_heads import real_tokens

__all__ = ["Arguments"]


class Arguments(nn.Module):
    """The part of `HuggingFaceModel` that makes arguments of transformers out of a batch's entries.

    Attributes:
        config: a HuggingFaceConfig.
    """

    config: Any

    def key_mask_of(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens of a batch are real, bool [B, T]; None where all are, or a row holds several documents."""
        return batch.get("key_mask") if "document_ids" in batch else real_tokens(batch)

    def named_inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        key_mask: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> dict[str, Any]:
        """The arguments for a batch's entries; see `HuggingFaceModel.hidden_states`."""
        accepted = self.__dict__["accepted"]
        named: dict[str, Any] = {"input_ids": input_ids}
        one_kind = getattr(self.config, "type_vocab_size", None) == 1  # RoBERTa: every token is of it
        if token_type_ids is not None and "token_type_ids" in accepted and not one_kind:
            named["token_type_ids"] = token_type_ids
        if document_ids is not None:
            packing = self._packing()
            if position_ids is None:
                position_ids = positions_in(document_ids)
            named.update(self.packed(packing, position_ids, document_ids))
        elif key_mask is not None:
            named["attention_mask"] = key_mask.long()
        elif position_ids is not None and "position_ids" in accepted:
            named["position_ids"] = position_ids.expand(input_ids.shape) + self.__dict__["first_position"]
        return named

    def packed(self, packing: Packing, position_ids: Tensor, document_ids: Tensor) -> dict[str, Any]:
        """The arguments that say where documents are."""
        return packed_inputs(
            packing,
            position_ids,
            document_ids,
            causal=self.config.kind == "causal_lm",
            first=self.__dict__["first_position"],
            dtype=self.head_dtype,
        )

    @property
    def head_dtype(self) -> torch.dtype:
        """The type in which the model computes outside autocast."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def _packing(self) -> Packing:
        """How documents of one row are kept apart, proven on two of them once."""
        if "_packing_found" not in self.__dict__:
            model: Any = self
            self.__dict__["_packing_found"] = find_packing(model)
        found: Packing | str = self.__dict__["_packing_found"]
        if isinstance(found, str):
            raise packing_refused(type(self).__name__, found)
        return found

    @property
    def padding_id(self) -> int:
        """A token that stands where nothing is; which one does not matter, because it is masked."""
        pad = self.config.values.get("pad_token_id")
        return 0 if pad is None else int(pad)

    @property
    def decoder_start_id(self) -> int:
        """The token before the first that an encoder-decoder writes.

        Raises:
            ModelError: its configuration names none.
        """
        start: int | None = self.config.decoder_start_id
        if start is None:
            raise ModelError(
                f"{type(self).__name__} names no token that a text begins with",
                hint="set decoder_start_token_id in its config.json",
            )
        return start

    def shift_right(self, labels: Tensor) -> Tensor:
        """decoder_input_ids [B, U] for labels [B, U]: the start token, then all but the last; -100 becomes padding."""
        shifted = torch.full_like(labels, self.decoder_start_id)
        shifted[:, 1:] = labels[:, :-1]
        return torch.where(shifted < 0, self.padding_id, shifted)
