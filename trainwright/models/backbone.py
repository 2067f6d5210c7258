"""What every native family offers to tasks, trainer and layouts: a trunk, and what stands on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.attention import SelfAttention
from trainwright.models.dropout import DropoutPlace, join_place
from trainwright.ops.attention.choose import check_backend
from trainwright.ops.labelled_rows import labelled_rows
from trainwright.ops.linear_cross_entropy import LossSums, linear_cross_entropy

__all__ = ["Backbone"]


class Backbone(nn.Module, ABC):
    """A trunk (embedding, repeated blocks, a norm) with a language-model head or, in its place, the head of a task.

    `head_name`: which module of this one is the task's head; None where the language-model head stands.
    """

    config: Any
    lm_head: Any
    head_name: str | None = None

    # --- the trunk ---

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | nn.ModuleDict:
        """The repeated layers, in order; each may be compiled, checkpointed or sharded on its own.

        Where other processes hold some of them, a ModuleDict of the ones that are here, by their number.
        """

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The token embedding [V, D]."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block; worth compiling with them."""

    @abstractmethod
    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """What the first block gets, [B, T, D], of input_ids [B, T] at position_ids [T] or [B, T].

        token_type_ids [B, T]: which of two texts a token is of; families without such an embedding ignore it.
        """

    @abstractmethod
    def run_blocks(
        self,
        x: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] through the blocks that this module holds, in order."""

    @abstractmethod
    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """The trunk's output after the final norm, [B, T, D], of input_ids [B, T].

        position_ids [B, T]: default counts from 0. document_ids [B, T]: a token attends only inside its own document
        (packed rows). key_mask [B, T]: True for real tokens. token_type_ids [B, T]: see `embed`.
        """

    def check_positions(self, last: int) -> None:
        """Refuse a sequence of so many positions (a ModelError) where the family has learned fewer."""

    def key_mask_of(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens of a batch are real, bool [B, T]; None where that does not matter."""
        return batch.get("key_mask")

    def hidden_states_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`hidden_states` [B, T, D] of a batch: `input_ids` and, where there are any, `position_ids`, `document_ids`,
        `key_mask` (or `lengths`) and `token_type_ids`."""
        return self.hidden_states(
            batch["input_ids"],
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
            key_mask=self.key_mask_of(batch),
            token_type_ids=batch.get("token_type_ids"),
        )

    # --- what stands on it ---

    def head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> LossSums:
        """Loss sums of the language-model head's logits for hidden [N, D] against labels [N] (-100: not trained),
        without holding all logits; who divides the vocabulary over processes puts another function here.

        Raises:
            ModelError: the head of a task stands in its place.
        """
        projection = self.language_head
        hidden, labels = self.head_inputs(hidden, labels)
        return linear_cross_entropy(
            hidden,
            projection.weight,
            labels,
            bias=projection.bias,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=compiled,
        )

    def head_inputs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the output projection gets for hidden [N, D], and the labels of it; rows without one may be left out.

        Here they are on a CPU. Elsewhere counting them would hold the host up in every micro-batch.
        """
        return labelled_rows(hidden, labels) if labels.device.type == "cpu" else (hidden, labels)

    def logits(self, hidden: Tensor) -> Tensor:
        """The language-model head's logits [..., V] of hidden states [..., D].

        Raises:
            ModelError: the head of a task stands in its place.
        """
        logits: Tensor = self.language_head(hidden)
        return logits

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V, D], so that a loss can be computed without holding all logits."""
        return self.language_head.weight

    @property
    def language_head(self) -> nn.Linear:
        """`output_projection`; a ModelError where the head of a task stands in its place."""
        projection = self.output_projection
        if projection is None:
            raise ModelError(
                f"{type(self).__name__} has {'the head of a task' if self.head_name else 'no head here'}, "
                "which gives no words",
                hint="load or build the model without a task's head",
            )
        return projection

    @property
    def task_head(self) -> nn.Module | None:
        """The head that `attach_head` put in place of the language-model head; None where that stands, and where
        another process holds the head."""
        return None if self.head_name is None else getattr(self, self.head_name)

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the task's head says of a batch, fp32: "sequence" and "entities" [B, L], "token" [B, T, L], "span"
        [B, T, 2], "embedding" [B, D].

        batch: as `hidden_states_of`; `lengths` or `key_mask` say where texts end, `entity_starts` [B, 2] where the two
        markers of "entities" begin.

        Raises:
            ModelError: the model has no such head.
        """
        return self.head_scores(self.hidden_states_of(batch), batch)

    def head_scores(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """`scores` from hidden states [B, T, D]; who divides the trunk over processes puts another function here."""
        head = self.task_head
        if head is None:
            raise ModelError(
                f"{type(self).__name__} has a language-model head, which gives no scores",
                hint="attach_head(model, HeadSpec(...)) puts a task's head in its place",
            )
        scores: Tensor = head(hidden, batch)
        return scores

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the configuration says so. Call again after replacing either.

        Nothing where another process holds one of them.
        """
        projection = self.output_projection
        if self.config.tie_embeddings and projection is not None and self.embedding is not None:
            projection.weight = self.embedding.weight

    @property
    def output_projection(self) -> nn.Linear | None:
        """The linear that makes logits; None where it is not here."""
        projection: nn.Linear | None = self.lm_head
        return projection

    # --- what a mixture of experts adds ---

    def auxiliary_loss(self, labels: Tensor) -> Tensor | None:
        """What the latest forward pass in training adds to the loss sum over the trained tokens of labels [B, T].

        Of the blocks that are here; given once for each forward pass. None where a family adds nothing.
        """
        return None

    def take_loads(self) -> Tensor | None:
        """What this process's tokens asked of the model's experts since the last call; integers on the device, to be
        added up over all processes with other tokens and given to `update_balance`. None where no experts are."""
        return None

    def update_balance(self, loads: Tensor) -> None:
        """End an optimizer step with the loads of all processes."""

    def load_statistics(self) -> dict[str, float]:
        """The latest step's loads as numbers for a log, given up when read; waits for the device."""
        return {}

    # --- switches ---

    @property
    def dropout_place(self) -> DropoutPlace:
        """Which tokens the dropouts of this model see; for `set_dropout` and for who divides sequences."""
        place: DropoutPlace = self.__dict__.setdefault("_dropout_place", DropoutPlace())
        return place

    def set_dropout(self, *, seed: int | None, rows: Tensor | None) -> None:
        """What the coming forward pass drops: a pure function of the step's seed, the global numbers of its rows [B],
        documents and positions, whatever the layout. None for both goes back to torch's generator."""
        if rows is None or join_place(self, self.dropout_place, rows.device):
            self.dropout_place.set(seed, rows)

    def set_attention_backend(self, name: str) -> None:
        """Use one backend of `ops.attention.BACKENDS`, or "auto", wherever no cache is.

        Raises:
            ModelError: no backend is called that.
        """
        if name != "auto":
            check_backend(name)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.attention_backend = name

    def positions_of(self, input_ids: Tensor, position_ids: Tensor | None, past: int = 0) -> Tensor:
        """`position_ids`, or counting on from `past` where there are none."""
        if position_ids is not None:
            return position_ids
        last = past + input_ids.shape[1]
        self.check_positions(last)
        return torch.arange(past, last, device=input_ids.device)
