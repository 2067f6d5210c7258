"""What every encoder family offers: every token sees all of its text, and hidden tokens are predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from trainwright.models.backbone import Backbone
from trainwright.models.task_heads import real_tokens
from trainwright.ops.labelled_rows import labelled_rows

__all__ = ["Encoder", "MaskedHead"]


class MaskedHead(nn.Module, ABC):
    """Logits of hidden tokens: decoder(norm(activation(dense(x)))), the decoder's matrix tied to the embedding."""

    dense: nn.Linear
    layer_norm: nn.Module
    decoder: nn.Linear

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """What the decoder gets, [..., D]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class Encoder(Backbone):
    """A bidirectional language model: token ids in, logits of the tokens themselves out."""

    lm_head: MaskedHead

    def key_mask_of(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Padding is hidden from every token; packed rows hold it apart as a document of its own."""
        return None if batch.get("document_ids") is not None and "key_mask" not in batch else real_tokens(batch)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        position_ids = self.positions_of(input_ids, position_ids)
        self.dropout_place.locate(position_ids, document_ids)
        x = self.embed(input_ids, position_ids, token_type_ids)
        normed: Tensor = self.final_norm(self.run_blocks(x, position_ids, document_ids, key_mask))
        return normed

    def head_inputs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows that have a label: the others cost nothing."""
        hidden, labels = labelled_rows(hidden, labels)
        return self.lm_head.transform(hidden), labels

    @property
    def output_projection(self) -> nn.Linear | None:
        return None if self.lm_head is None else self.lm_head.decoder

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T]; see `hidden_states` for the arguments."""
        hidden = self.hidden_states(
            input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            key_mask=key_mask,
            token_type_ids=token_type_ids,
        )
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        projection = self.language_head
        logits: Tensor = projection(self.lm_head.transform(hidden))
        return logits
