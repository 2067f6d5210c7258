"""Rows cut for the context ranks, and what they computed put together again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Axis
from trainwright.parallel.context.order import SequenceOrder

__all__ = ["cut_batch", "gather_sequence"]


def cut_batch(batch: Mapping[str, Tensor], axis: Axis, order: SequenceOrder) -> dict[str, Tensor]:
    """This context rank's part of a batch of whole rows [B, T], which all ranks of the axis pass alike.

    Everything [B, T, ...] is cut (input_ids, labels, document_ids, position_ids); the rest, such as numbers of rows
    [B], stays. Where position_ids are missing they are made, because positions of a part do not count from zero.
    Labels are expected to be aligned with the inputs already, so that the token after a cut needs nobody's help.

    Raises:
        ConfigError: T cannot be divided; the nearest lengths that can are named. Or a key mask is there.
    """
    if axis.size == 1:
        return dict(batch)
    rows, length = batch["input_ids"].shape[:2]
    order.check(length)
    if batch.get("key_mask") is not None:
        raise ConfigError(
            "a batch with a key mask cannot be cut for parallel.context",
            hint="padding at the end of a row needs no mask: give padding labels of -100 or a document of its own",
        )
    device = batch["input_ids"].device
    index = order.index(axis.rank, length, device)
    found = {
        name: value.index_select(1, index.to(value.device)) if value.shape[:2] == (rows, length) else value
        for name, value in batch.items()
    }
    if "position_ids" not in batch:
        found["position_ids"] = index.expand(rows, -1)
    elif batch["position_ids"].shape == (length,):
        found["position_ids"] = batch["position_ids"][index]
    return found


def gather_sequence(part: Tensor, axis: Axis, order: SequenceOrder) -> Tensor:
    """[B, T / degree, ...] of every context rank as [B, T, ...] in the order of the row, on every rank; no gradient."""
    if axis.size == 1:
        return part
    whole = torch.empty(axis.size, *part.shape, dtype=part.dtype, device=part.device)
    dist.all_gather(list(whole.unbind()), part.detach().contiguous(), group=axis.group)
    joined = whole.movedim(0, 1).flatten(1, 2)
    return joined.index_select(1, order.row_order(joined.shape[1], part.device))
