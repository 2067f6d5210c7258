"""One part of a native model: the seams that every family has, with the blocks that are here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainwright.models import Backbone
from trainwright.models.registry import model_plan
from trainwright.parallel.pipeline.parts import Anatomy, Part
from trainwright.parallel.pipeline.stack import StageBlocks

__all__ = ["NativeStage", "native_anatomy"]


def native_anatomy(model: Backbone) -> Anatomy:
    """Where the parts of a native model are: its family's plan says it."""
    plan = model_plan(model.config)
    before = (plan.before,) if plan.before is not None else (plan.embedding, plan.position_embedding)
    first = tuple(name for name in before if name is not None)
    return Anatomy(plan.blocks, first, (plan.final_norm, plan.head_module), plan.head_module, plan.tied)


class NativeStage:
    """`run_stage` of a split native model."""

    def __init__(self, model: Backbone) -> None:
        self.model = model

    def __call__(self, x: Tensor | None, batch: Mapping[str, Tensor], part: Part) -> Tensor:
        """The output of one part, [B, T, D]: after the final norm for the last.

        Args:
            x: what the part before put out; None for the first.
            batch: `input_ids` [B, T] (their shape alone matters to later parts), and what `hidden_states_of` reads
                beside them.
        """
        model = self.model
        input_ids, position_ids = batch["input_ids"], batch.get("position_ids")
        if position_ids is None:
            model.check_positions(input_ids.shape[1])
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        model.dropout_place.locate(position_ids, batch.get("document_ids"))
        if part.is_first:
            x = model.embed(input_ids, position_ids, batch.get("token_type_ids"))
        assert x is not None
        assert isinstance(model.blocks, StageBlocks)
        with model.blocks.only(part.blocks):
            x = model.run_blocks(x, position_ids, batch.get("document_ids"), model.key_mask_of(batch))
        if part.is_last:
            x = model.final_norm(x)
        assert x is not None
        return x
