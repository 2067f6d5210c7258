"""From a batch of this project to the arguments of a transformers model, packed rows included."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.base.errors import ModelError

__all__ = ["PACKINGS", "Packing", "accepted_names", "document_mask", "packed_inputs", "packing_refused", "positions_in"]


@dataclass(frozen=True)
class Packing:
    """A way to tell a model that a row holds several documents.

    positions: give positions that start over in each document. mask: give [B, 1, T, T] of what may be seen, as bool or
    as numbers to add; without it the model finds the documents by the positions.
    """

    positions: bool
    mask: Literal["none", "bool", "added"]


PACKINGS = (Packing(True, "none"), Packing(True, "bool"), Packing(True, "added"), Packing(False, "added"))
"""In the order in which they are tried: the first needs no mask in memory and keeps sliding windows."""


def accepted_names(model_class: type[Any]) -> frozenset[str]:
    """Names of the arguments of a class's forward pass."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def document_mask(document_ids: Tensor, kind: str, *, causal: bool, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] of which keys each token of document_ids [B, T] sees: its own document's, earlier ones if causal."""
    seen = document_ids[:, :, None] == document_ids[:, None, :]
    if causal:
        seen = seen & torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril()
    seen = seen[:, None]
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def packed_inputs(
    packing: Packing, position_ids: Tensor, document_ids: Tensor, *, causal: bool, first: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments that say where documents are. first: number of a document's first position."""
    named: dict[str, Any] = {}
    if packing.positions:
        named["position_ids"] = position_ids.expand(document_ids.shape) + first
    if packing.mask != "none":
        named["attention_mask"] = document_mask(document_ids, packing.mask, causal=causal, dtype=dtype)
    return named


def packing_refused(name: str, why: str) -> ModelError:
    """The error for a model that cannot keep documents of one row apart."""
    return ModelError(
        f"{name} cannot be trained on rows that hold several documents: {why}",
        hint="set data.packing=pad, which gives each document a row of its own",
    )


def positions_in(document_ids: Tensor) -> Tensor:
    """Positions [B, T] that start over where document_ids [B, T] change."""
    length = document_ids.shape[1]
    places = torch.arange(length, device=document_ids.device).expand(document_ids.shape)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values
