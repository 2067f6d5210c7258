"""Making a model the same on all ranks before it is divided."""

from __future__ import annotations

import torch
from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.comm.ranks import Ranks

__all__ = ["synchronise"]


@torch.no_grad()
def synchronise(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the parameters and buffers of rank 0; a collective of all ranks.

    Raises:
        ConfigError: the ranks hold different modules; names the first difference.
    """
    if ranks.world == 1:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    form = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]
    first = ranks.broadcast_json(form)
    differing = next((pair for pair in zip(form, first, strict=False) if pair[0] != pair[1]), None)
    if ranks.any(differing is not None or len(form) != len(first)):
        seen = f"{len(form)} tensors here, {len(first)} on rank 0"
        if differing is not None:
            seen = f"{differing[0]} here, {differing[1]} on rank 0"
        raise ConfigError(
            f"the ranks hold different models: {seen}", hint="build the same module, in the same order, on every rank"
        )
    for tensor in tensors.values():
        ranks.broadcast_(tensor.data)
