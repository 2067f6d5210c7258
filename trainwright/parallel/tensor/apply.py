"""Dividing a model over the ranks of a tensor axis (Megatron-LM, arXiv 1909.08053, with sequence parallelism,
arXiv 2205.05198).

Each block's matrices are cut into one that divides its output features and one that divides its input features, so that
a half of a block needs one gather of tokens before and one sum after. Between the halves every rank holds its own part
of the tokens. The vocabulary is divided in the embedding and in the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models.backbone import Backbone
from trainwright.models.dropout import AttentionDropout
from trainwright.models.registry import model_plan
from trainwright.models.structure import ModelPlan
from trainwright.ops.linear_cross_entropy import LossSums
from trainwright.ops.vocab_parallel_cross_entropy import VocabularyPart, vocab_parallel_cross_entropy
from trainwright.parallel.tensor.collectives import stack_parts
from trainwright.parallel.tensor.hugging_face import apply_tensor_plan
from trainwright.parallel.tensor.legality import legal_degrees, tensor_problems
from trainwright.parallel.tensor.modules import (
    enter_at,
    enter_behind,
    make_column,
    make_row,
    make_shared_heads,
    make_vocabulary,
    make_whole,
    positions_of,
)
from trainwright.parallel.tensor.parameters import Divider, local, part_of
from trainwright.parallel.tensor.stream import Stream

__all__ = ["apply_tensor"]


def apply_tensor(model: nn.Module, axis: Axis, plan: ModelPlan | None = None) -> nn.Module:
    """Divide `model` over the ranks of `axis` in place; returns it. No message is sent: ranks hold equal values, or
    none (on the meta device).

    From outside the model is what it was: whole ids and labels go in, whole hidden states and sums come out, parameter
    names stay. Parameters become DTensors on `axis.mesh`; of those that each rank holds whole, each has an addend of
    the gradient (`Partial`), which FSDP2 or `parallel.complete_sums` sums. Inside, blocks see [B, T / t, D].

    Args:
        axis: an axis of one rank leaves the model alone.
        plan: of a native decoder, or of the part of it that a pipeline stage holds; default its family's. Hugging Face
            models bring their own.

    Raises:
        ConfigError: the degree does not divide what may not be cut; every reason is named.
        ModelError: the model has no plan, or parameters that no plan knows.
    """
    if axis.size == 1:
        return model
    if axis.mesh is None:
        raise ConfigError(f"the {axis.name} axis of {axis.size} ranks has no mesh to divide parameters on")
    if not isinstance(model, Backbone):
        if plan is not None:
            raise ModelError(f"a plan was given for {type(model).__name__}, which is no native decoder")
        return apply_tensor_plan(model, axis)
    plan = plan or model_plan(model.config)
    problems = tensor_problems(plan, axis.size)
    if problems:
        legal = ", ".join(map(str, legal_degrees(plan, 8 * axis.size)))
        raise ConfigError(
            f"the model cannot be divided over {axis.size} ranks: " + "; ".join(problems),
            hint=f"parallel.tensor can be {legal}",
        )
    _Native(model, plan, axis).apply()
    return model


def find(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name; None where another process has it."""
    for part in name.split("."):
        inner = module._modules.get(part)
        if inner is None:
            return None
        module = inner
    return module


class _Native:
    """Divides one native decoder, or what of it is here."""

    def __init__(self, model: Backbone, plan: ModelPlan, axis: Axis) -> None:
        self.model = model
        self.plan = plan
        self.axis = axis
        self.stream = Stream(axis)
        self.divider = Divider(axis)
        self.cache_heads: int | None = None

    def apply(self) -> None:
        self._divide_ends()
        blocks = find(self.model, self.plan.blocks)
        for block in blocks.children() if blocks is not None else ():
            self._divide_block(block)
        self._refuse_unknown()
        self.model.dropout_place.slice_rank = self.axis.rank
        self.model.__class__ = _divided_class(type(self.model))
        assert isinstance(self.model, _DividedBackbone)
        self.model.stream = self.stream
        self.model.own_cache_heads = self.cache_heads

    def _divide_ends(self) -> None:
        """Embeddings, final norm and head; a part of a pipeline may lack any of them."""
        plan, divider, stream = self.plan, self.divider, self.stream
        embedding, head = find(self.model, plan.embedding), find(self.model, plan.head)
        if self.model.head_name is not None:
            self._hold_task_head(head)
            head = None
        for vocabulary in (embedding, head):
            weight = None if vocabulary is None else vocabulary._parameters["weight"]
            if weight is not None and part_of(weight.shape[0], self._last())[1] == 0:
                raise ConfigError(
                    f"a vocabulary of {weight.shape[0]} words leaves some of {self.axis.size} ranks without any",
                    hint="divide over fewer ranks",
                )
        if embedding is not None:
            make_vocabulary(embedding, divider, stream)
        for name in (plan.position_embedding, *plan.embedding_rest):
            module = find(self.model, name) if name else None
            if isinstance(module, nn.Embedding):
                positions_of(module, divider, stream)
            elif module is not None:
                make_whole(module, divider, adds=True)
        norm = find(self.model, plan.final_norm)
        if norm is not None:
            make_whole(norm, divider, adds=True)
            enter_behind(norm, stream)
        if head is not None:
            make_column(head, divider, stream, joins=True)
            for name in plan.head_rest:  # its output's gradient is this rank's addend, as that of the divided words is
                rest = find(self.model, name)
                assert rest is not None
                make_whole(rest, divider, adds=True)

    def _hold_task_head(self, head: nn.Module | None) -> None:
        """Each rank has all of the head of a task, and computes the same with it."""
        for module in head.modules() if head is not None else ():
            make_whole(module, self.divider, adds=False)

    def _last(self) -> Axis:
        return Axis(self.axis.name, self.axis.size - 1, self.axis.size)

    def _divide_block(self, block: nn.Module) -> None:
        entered: dict[str, None] = {}
        units = {linear.name: linear.units for linear in self.plan.linears}
        for linear in self.plan.linears:
            module = find(block, linear.name)
            if module is None:  # blocks of one model may differ (dense and expert layers)
                continue
            parent = linear.name.rpartition(".")[0]
            if linear.kind == "row":
                make_row(module, self.divider, self.stream)
            elif linear.serves is not None and linear.units % self.axis.size:
                self.cache_heads = make_shared_heads(
                    module, self.divider, queries=units[linear.serves], heads=linear.units
                )
            else:
                make_column(module, self.divider, self.stream, enters=not parent)
            if linear.kind == "column" and parent:
                entered[parent] = None
        for name in entered:
            parent_module = find(block, name)
            assert parent_module is not None
            enter_at(parent_module, self.stream)
        for dropout in block.modules():
            if isinstance(dropout, AttentionDropout):
                dropout.first_head = part_of(self.model.config.num_heads, self.axis)[0]
        # What is left sees a part of the tokens (norms) or of the heads (norms of queries and keys).
        for module in block.modules():
            if any(not self.divider.is_made(p) for p in module._parameters.values() if p is not None):
                make_whole(module, self.divider, adds=True)

    def _refuse_unknown(self) -> None:
        unknown = [name for name, parameter in self.model.named_parameters() if not self.divider.is_made(parameter)]
        if unknown:
            raise ModelError(
                f"parameters that no tensor plan knows: {', '.join(unknown[:6])}",
                hint="set parallel.tensor=1, or add them to the family's plan.py",
            )


class _DividedBackbone(Backbone):
    """What a native model does otherwise while its vocabulary and its residual stream are divided."""

    stream: Stream
    own_cache_heads: int | None

    def run_blocks(self, x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        self.stream.resume(x.shape[1], position_ids.shape[-1])
        out: Tensor = super().run_blocks(x, position_ids, *rest, **named)  # type: ignore[safe-super]
        return out

    def head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> LossSums:
        axis, head = self.stream.axis, self.language_head
        words = head.out_features
        part = VocabularyPart(part_of(words, axis)[0], words, axis.size, lambda numbers: stack_parts(numbers, axis))
        hidden, labels = self.head_inputs(hidden, labels)
        return vocab_parallel_cross_entropy(
            hidden,
            local(head.weight, Shard(0)),
            labels,
            part,
            bias=None if head.bias is None else local(head.bias, Shard(0)),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=compiled,
        )

    def head_scores(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        # All ranks compute the same scores from the same hidden states, whose gradients are then summed over the ranks.
        shared: Tensor = _OneOfEqual.apply(hidden, self.stream.axis.size)
        return super().head_scores(shared, batch)

    @property
    def cache_heads(self) -> int:
        if self.own_cache_heads is not None:
            return self.own_cache_heads
        heads: int = self.config.num_kv_heads
        return heads // self.stream.axis.size


class _OneOfEqual(torch.autograd.Function):
    """x itself; of its gradient, which is the same on all `count` ranks, the part that sums to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.count, None


def _divided_class(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (_DividedBackbone, kind), {"__module__": kind.__module__})
