"""Putting a task's head in place of the language-model head."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import nn

from trainwright.base.errors import ModelError
from trainwright.models.backbone import Backbone
from trainwright.models.heads import HeadSpec, head_module_name
from trainwright.models.hugging_face.build import swap_head
from trainwright.models.hugging_face.model import HuggingFaceModel
from trainwright.models.initialise import initial_value
from trainwright.models.task_heads import DenseHead, EmbeddingHead, RowHead, TokenHead

__all__ = ["attach_head", "make_head"]

Model = TypeVar("Model", bound=Backbone)


def attach_head(model: Model, spec: HeadSpec, *, seed: int = 0) -> Model:
    """Put the head that `spec` describes in place of the language-model head, in place; returns the model.

    `model.lm_head` becomes None and `model.config.head` is the spec, so that the configuration describes the whole
    model. On the meta device the head has no storage, as the rest has none; elsewhere it starts from `initial_value`
    of its names. Call it before the model is divided.

    Raises:
        ModelError: a head of labels has none, or the model has been split over a pipeline.
    """
    if isinstance(model, HuggingFaceModel):
        attached: Any = swap_head(model, spec, seed=seed)
        return attached
    if model.embedding is None:
        raise ModelError("this model is a part of a pipeline already", hint="attach the head before the model is split")
    weight = model.embedding.weight
    config = dataclasses.replace(model.config, head=spec)
    with torch.device("meta"):
        head = make_head(config, spec).to(weight.dtype)
    if model.head_name is not None:
        delattr(model, model.head_name)
    name = head_module_name(config.to_hf()["model_type"], spec.kind)
    model.config = config
    model.lm_head = None
    setattr(model, name, head)
    model.head_name = name
    head.train(model.training)
    if weight.device.type != "meta":
        head.to_empty(device=weight.device)
        with torch.no_grad():
            for inner, parameter in head.named_parameters():
                parameter.copy_(initial_value(f"{name}.{inner}", parameter.shape, config, seed))
    return model


def make_head(config: Any, spec: HeadSpec) -> nn.Module:
    """The module of a head on a trunk of this configuration.

    Raises:
        ModelError: it needs labels and has none.
    """
    width, labels = config.hidden_size, 2 if spec.kind == "span" else len(spec.labels)
    encoder = config.family == "bert"
    pooling = spec.pooling if spec.pooling != "auto" else ("first" if encoder else "last")
    if spec.kind == "embedding":
        return EmbeddingHead(pooling=pooling)
    if not labels:
        raise ModelError(f"a head of kind {spec.kind!r} needs labels", hint="HeadSpec(kind, labels=(...))")
    if spec.kind in ("token", "span"):
        return TokenHead(width, labels, dropout=spec.dropout, crf=spec.crf and spec.kind == "token")
    if spec.kind == "entities":
        return DenseHead(width, labels, pooling=None, dropout=spec.dropout, dropout_in=False)
    if encoder:
        roberta = config.architecture != "bert"
        return DenseHead(width, labels, pooling=pooling, dropout=spec.dropout, dropout_in=roberta)
    return RowHead(width, labels, pooling=pooling, dropout=spec.dropout, bias=False)
