"""Context parallelism: every rank holds a part of each row, and attention alone looks across the cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models import Backbone, Encoder
from trainwright.models.attention import SelfAttention, attend
from trainwright.models.cache import LayerCache
from trainwright.models.dropout import KeptWeights
from trainwright.ops.attention import autocast_inputs
from trainwright.parallel.context.exchange import ContextGroup
from trainwright.parallel.context.order import SequenceOrder
from trainwright.parallel.context.problems import choose_ulysses, context_problems
from trainwright.parallel.context.ring import Masking, Ring, ring_attention
from trainwright.parallel.context.ulysses import heads_to_positions, positions_to_heads

__all__ = ["ContextAttention", "apply_context"]


class ContextAttention:
    """Stands behind `SelfAttention.attend` of a model whose rows are divided over `group`.

    Shapes are those of `models.attention.attend`, T being this rank's part of the row.
    """

    def __init__(self, group: ContextGroup, compiled: bool) -> None:
        self.group = group
        self.ring = Ring(group, compiled)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        document_ids: Tensor | None,
        key_mask: Tensor | None,
        cache: LayerCache | None,
        window: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        kept: KeptWeights | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Causal attention of this rank's tokens over those of all context ranks.

        With a cache the rows are whole on every rank (generation), and attention is that of one process.

        Raises:
            ModelError: weights dropped out by torch's generator, a key mask without a cache, or heads that the group
                cannot divide.
        """
        masks: dict[str, Any] = {"window": window, "scale": scale}
        if cache is not None:
            return attend(q, k, v, document_ids=document_ids, key_mask=key_mask, cache=cache, **masks)
        self._check(q, key_mask, dropout, kept)
        q, k, v = autocast_inputs(q, k, v)
        order = self.group.order
        documents = None if document_ids is None else self.group.gather(document_ids.to(torch.int32), "documents")
        if order.ulysses > 1:
            q, k, v = positions_to_heads(self.group, q, k, v)
        kept = self._kept_of_all(kept, q.shape[2]) if dropout > 0.0 and kept is not None else None
        if order.ring > 1:
            out = ring_attention(self.ring, q, k, v, self._masking(q, documents, window, scale, kept))
        else:
            masks.update(dropout=dropout, kept=kept, backend=backend)
            out = attend(q, k, v, document_ids=documents, key_mask=None, cache=None, **masks)
        return heads_to_positions(self.group, out) if order.ulysses > 1 else out

    def _check(self, q: Tensor, key_mask: Tensor | None, dropout: float, kept: KeptWeights | None) -> None:
        if dropout > 0.0 and kept is None:
            raise ModelError(
                f"attention weights with dropout {dropout} on rows that are divided over {self.group.axis.size} ranks",
                hint="call model.set_dropout(seed=..., rows=...) before each forward pass, or no attention dropout",
            )
        if key_mask is not None:
            raise ModelError(
                "a key mask on rows that are divided over ranks",
                hint="padding at the end of a row needs no mask: give padding labels of -100 or a document of its own",
            )
        if q.shape[2] % self.group.order.ulysses:
            raise ModelError(
                f"{q.shape[2]} attention heads cannot be divided over parallel.ulysses {self.group.order.ulysses}",
                hint="use a parallel.ulysses that divides them, auto, or 1 for ring attention",
            )

    def _kept_of_all(self, kept: KeptWeights, heads: int) -> KeptWeights:
        """The same for the queries of this Ulysses group, the keys of all ranks and the `heads` heads here."""
        group = self.group
        positions = group.gather(kept.positions if kept.positions.dim() == 2 else kept.positions[None], "positions")
        keys = kept.keys
        if group.order.ulysses > 1:
            held = keys.shape[1] * group.order.ulysses
            keys = group.gather(keys, "dropout_keys")[:, group.ring_rank * held : (group.ring_rank + 1) * held]
        place = group.axis.rank % group.order.ulysses
        return KeptWeights(kept.p, keys, positions, kept.first_head + place * heads)

    def _masking(
        self, q: Tensor, documents: Tensor | None, window: int | None, scale: float | None, kept: KeptWeights | None
    ) -> Masking:
        masking = Masking(documents, window, q.shape[-1] ** -0.5 if scale is None else scale)
        if kept is None:
            return masking
        return masking._replace(keys=kept.keys, places=kept.positions, dropout=kept.p, first_head=kept.first_head)


def apply_context(
    model: nn.Module,
    axis: Axis,
    *,
    ulysses: int | str = "auto",
    heads: tuple[int, int] | None = None,
    compiled: bool = False,
) -> SequenceOrder:
    """Let the attention of a native model look across the cuts of rows divided over a context axis; in place.

    Batches are cut with `cut_batch` in the order that this returns, and positions are given with them. Call it after
    tensor parallelism and before recomputing, compiling and ZeRO. An axis of one rank changes nothing.

    Args:
        ulysses: context ranks that exchange heads for positions, a divisor of the axis; the groups form a ring. "auto"
            takes the most that divide the heads (`choose_ulysses`).
        heads: (query heads, key-value heads) of one rank, for "auto"; default those of `model.config`. Needed where
            tensor parallelism has divided them.
        compiled: fuse the steps of ring attention between its products by torch.compile.

    Raises:
        ConfigError: the model has the head of a task, is an encoder, or has no native attention module; or ulysses
            does not divide the axis.
    """
    if axis.size == 1:
        return SequenceOrder(1)
    if isinstance(model, Backbone) and (model.head_name is not None or isinstance(model, Encoder)):
        raise ConfigError("; ".join(context_problems(model.config, None, axis.size)), hint="set parallel.context=1")
    modules = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no attention that parallel.context knows",
            hint="use a native family (model.preset, or model.path of a supported architecture)",
        )
    if isinstance(ulysses, str):
        if heads is None:
            if not isinstance(model, Backbone):
                raise ConfigError("ulysses=auto needs the numbers of heads", hint="pass heads=..., or a number")
            heads = model.config.num_heads, model.config.num_kv_heads
        ulysses = choose_ulysses(axis.size, *heads)
    order = SequenceOrder(axis.size, ulysses)
    shared = ContextAttention(ContextGroup(axis, order), compiled)
    for module in modules:
        module.attend = shared.attend
    return order
