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
from trainwright.models.task_heads import pool

__all__ = ["add_own_head", "head_module_of", "named_scores", "swap_head"]

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


@torch.no_grad()
def swap_head(model: Any, spec: HeadSpec, build: Any, *, seed: int) -> Any:
    """Put another head on a model, in place: it becomes the class of transformers for it, with the same trunk.

    build: configuration -> model on the meta device.
    """
    if model.config.head == spec:
        return model
    from trainwright.models.initialise import initial_value
    from trainwright.models.weights import kept_tensors

    config = dataclasses.replace(model.config, head=spec)
    old, dtype, device = dict(model.state_dict()), model.head_dtype, model.embedding.weight.device
    new = build(config).to(dtype).train(model.training)
    if device.type != "meta":
        new.to_empty(device=device)
        new.tie_weights()
        first = f"{model.base_model_prefix}."
        for name, tensor in kept_tensors(new).items():
            known = next((n for n in (name, first + name, name.removeprefix(first)) if n in old), None)
            own = known is not None and old[known].shape == tensor.shape
            tensor.copy_(old[known] if own and known else initial_value(name, tensor.shape, config, seed))
    model.__dict__.clear()
    model.__dict__.update(new.__dict__)
    model.__class__ = new.__class__
    return model
