"""What every encoder family offers: every token sees all of its text, and hidden tokens are predicted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainwright.models.backbone import Backbone
from trainwright.models.task_heads import real_tokens
from trainwright.ops.contents import has_contents
from trainwright.ops.linear_cross_entropy import LossSums, linear_cross_entropy

__all__ = ["Encoder", "MaskedHead", "labelled_rows"]


class MaskedHead(nn.Module):
    """Logits of hidden tokens: decoder(norm(activation(dense(x)))), the decoder's matrix tied to the embedding."""

    dense: nn.Linear
    layer_norm: nn.Module
    decoder: nn.Linear

    def transform(self, x: Tensor) -> Tensor:
        """What the decoder gets, [..., D]."""
        raise NotImplementedError

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

    def head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> LossSums:
        """Loss sums of the head's logits for hidden [N, D] against labels [N]; only labelled rows are computed."""
        hidden, labels = labelled_rows(hidden, labels)
        decoder = self.lm_head.decoder
        return linear_cross_entropy(
            self.lm_head.transform(hidden),
            decoder.weight,
            labels,
            bias=decoder.bias,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=compiled,
        )

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, D]."""
        return self.lm_head.decoder.weight

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
        logits: Tensor = self.lm_head(hidden)
        return logits


def labelled_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of hidden [N, D] whose label [N] is not -100, and their labels: of masked language modelling 15 %.

    Their number is rounded up to a sixteenth of N (with unlabelled rows), so that few shapes occur: a compiled loss is
    compiled once for each. Where labels have no contents (a dry run), all rows are taken.
    """
    count = labels.shape[0]
    if not has_contents(labels) or count < 64:
        return hidden, labels
    step = -(-count // 16)
    chosen = int((labels != -100).sum())
    wanted = min(count, -(-max(chosen, 1) // step) * step)
    if wanted == count:
        return hidden, labels
    order = (labels == -100).to(torch.int8).argsort(stable=True)[:wanted]
    return hidden[order], labels[order]
