"""Heads of tasks on transformers models: its own class where it has one, else a head of ours on its bare trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.base.errors import ModelError
from trainwright.models.crf import LinearChainCRF
from trainwright.models.heads import HeadSpec
from trainwright.models.hugging_face.structure import HEAD_PREFIXES, trunk_prefix
from trainwright.models.task_heads import pool

__all__ = ["add_own_head", "head_module_of", "is_of_head", "named_scores"]

_NAMES = ("score", "classifier", "qa_outputs", "classification_head", "logits_proj")


class _OnlyTransitions(nn.Module):
    """Beside a head of transformers: what scores transitions between labels."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.crf = LinearChainCRF(labels)


def head_module_of(model: nn.Module) -> str:
    """The name of the module that makes scores in a class of transformers: what its forward pass calls last.

    Raises:
        ModelError: it has none that is known.
    """
    children = dict(model.named_children())
    found = next((name for name in _NAMES if name in children), None)
    if found is None:
        raise ModelError(
            f"which module of {type(model).__name__} makes its scores is not known",
            hint=f"known are modules called {', '.join(_NAMES)}",
        )
    return found


def is_of_head(model: Any, name: str) -> bool:
    """Whether a parameter of a model with the head of a task lies between its trunk and its scores: in the module that
    makes them, in a layer in front of it, or in a pooler, which stands in the trunk and which only heads of texts
    read."""
    prefix = trunk_prefix(model)
    if not prefix:
        return name.startswith(HEAD_PREFIXES)
    return not name.startswith(prefix) or (model.config.head.kind == "sequence" and ".pooler." in name)


def add_own_head(model: Any, spec: HeadSpec, *, on_trunk: bool) -> None:
    """Give a model on the meta device `task_head_`: a whole head on a bare trunk, or transitions beside its own."""
    from trainwright.models.attach import make_head

    pooling: Any = spec.pooling
    if pooling == "auto":
        pooling = "first" if model.config.kind == "masked_lm" else "mean" if model.config.is_encoder_decoder else "last"
    with torch.device("meta"):
        if on_trunk:
            model.task_head_ = make_head(model.config, dataclasses.replace(spec, pooling=pooling))
        elif spec.crf and spec.kind == "token":
            model.task_head_ = _OnlyTransitions(len(spec.labels))


def named_scores(model: Any, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores in fp32 of what the head of a class of transformers is given.

    A decoder's class scores every token and takes the last one that is not its padding token; here the last real one,
    which a text that holds that token cannot move.
    """
    head = model.get_submodule(model.__dict__["projection_name"])
    if model.config.head.kind == "sequence" and hidden.dim() == 3 and isinstance(head, nn.Linear):
        hidden = pool(hidden, batch, "last")
    scores: Tensor = head(hidden)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
