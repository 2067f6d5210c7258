"""Context parallelism: every rank holds a part of each row, and attention alone looks across the cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models import Decoder
from trainwright.models.attention import SelfAttention, attend
from trainwright.models.cache import LayerCache
from trainwright.ops.attention import attention
from trainwright.parallel.context.exchange import ContextGroup
from trainwright.parallel.context.order import SequenceOrder
from trainwright.parallel.context.problems import choose_ulysses
from trainwright.parallel.context.ring import Ring, ring_attention
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
        backend: str = "auto",
    ) -> Tensor:
        """Causal attention of this rank's tokens over those of all context ranks.

        With a cache the rows are whole on every rank (generation), and attention is that of one process.

        Raises:
            ModelError: dropout of attention weights, a key mask without a cache, or heads that the group cannot divide.
        """
        if cache is not None:
            return attend(
                q, k, v, document_ids=document_ids, key_mask=key_mask, cache=cache, window=window, scale=scale
            )
        self._check(q, key_mask, dropout)
        if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        order = self.group.order
        documents = self.group.gather_documents(document_ids) if document_ids is not None else None
        if order.ulysses > 1:
            q, k, v = positions_to_heads(self.group, q, k, v)
        if order.ring > 1:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            out = ring_attention(self.ring, q, k, v, documents, window=window, scale=scale)
        else:
            out = attention(q, k, v, document_ids=documents, window=window, scale=scale, backend=backend)
        return heads_to_positions(self.group, out) if order.ulysses > 1 else out

    def _check(self, q: Tensor, key_mask: Tensor | None, dropout: float) -> None:
        if dropout > 0.0:
            raise ModelError(
                f"attention weights with dropout {dropout} on rows that are divided over {self.group.axis.size} ranks",
                hint="set the model's attention dropout to 0, or parallel.context to 1",
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
        ConfigError: the model has no native attention module, or ulysses does not divide the axis.
    """
    if axis.size == 1:
        return SequenceOrder(1)
    modules = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no attention that parallel.context knows",
            hint="use a native family (model.preset, or model.path of a supported architecture)",
        )
    if isinstance(ulysses, str):
        if heads is None:
            if not isinstance(model, Decoder):
                raise ConfigError("ulysses=auto needs the numbers of heads", hint="pass heads=..., or a number")
            heads = model.config.num_heads, model.config.num_kv_heads
        ulysses = choose_ulysses(axis.size, *heads)
    order = SequenceOrder(axis.size, ulysses)
    shared = ContextAttention(ContextGroup(axis, order), compiled)
    for module in modules:
        module.attend = shared.attend
    return order
