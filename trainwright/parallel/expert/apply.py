"""Dividing the experts of a model over the ranks of an expert axis, and the width of each over a tensor axis.

The private `_get_root_mesh` of DeviceMesh is used here only: parameters divided on two axes need the mesh of both, and
FSDP2 joins its own only to a mesh of the same root.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models.backbone import Backbone
from trainwright.models.moe.layer import Experts, MoE, apply_experts
from trainwright.models.moe.model import MoEForCausalLM
from trainwright.ops.token_permutation import ExpertOrder, spread_tokens
from trainwright.parallel.expert.exchange import run_at_experts
from trainwright.parallel.expert.problems import expert_problems

__all__ = ["apply_expert", "expert_modules"]

_WIDTH = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}
"""The dimension of each expert matrix [E, ...] that is the width of the expert."""


def apply_expert(
    model: nn.Module, expert: Axis, *, tensor: Axis | None = None, context: Axis | None = None
) -> nn.Module:
    """Divide the experts of `model` in place; returns it. Call it after `apply_tensor`. No message is sent: ranks hold
    equal values, or none (on the meta device).

    Parameters of experts become DTensors: `Shard(0)` on the expert axis, the width of each on the tensor axis. Their
    gradients are sums over the tokens of all ranks of the expert axis. All ranks of the axis run as many forward and
    backward passes.

    Args:
        expert: the experts of each layer are divided over it.
        tensor: given where the model was divided over one: experts then see all tokens of the stream, and each rank
            computes a part of their width.
        context: given where sequences are cut: the auxiliary loss of a row adds up its pieces.

    Raises:
        ConfigError: a degree does not divide what it must; every reason is named.
        ModelError: experts of a model that is not native.
    """
    tensor = tensor or Axis.alone("tensor")
    context = context or Axis.alone("context")
    if expert.size == tensor.size == context.size == 1:
        return model
    if not isinstance(model, MoEForCausalLM):
        if expert.size > 1:
            raise _refusal(model, expert)
        return model
    problems = expert_problems(model.config, expert.size, expert.size, tensor=tensor.size, context=context.size)
    if problems:
        raise ConfigError("the experts cannot be divided: " + "; ".join(problems))
    if context.size > 1:
        model.sum_over_row = _summing(context)
    model.copies_of_row = tensor.size
    for moe in model.moe_layers():
        if tensor.size > 1:
            stream = _stream_of(model)
            moe.enter, moe.leave = stream.enter, stream.leave
        if expert.size > 1:
            moe.mix = _mixing(expert)
        if expert.size > 1 or tensor.size > 1:
            _divide(moe.experts, expert, tensor)
    return model


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the experts of every layer that is here: their parameters, and no others, are divided over the
    expert axis."""
    return [(f"{name}.experts", module.experts) for name, module in model.named_modules() if isinstance(module, MoE)]


def _refusal(model: nn.Module, expert: Axis) -> Exception:
    config = getattr(model, "config", None)
    if isinstance(model, Backbone):
        return ConfigError("; ".join(expert_problems(config, expert.size, expert.size)), hint="set parallel.expert=1")
    return ModelError(
        f"{type(model).__name__} is not a native model: where its tokens meet its experts is in its own code",
        hint="load it as a native model where its architecture is known (mixtral, qwen2_moe, qwen3_moe, dots1), "
        "or set parallel.expert=1",
    )


def _mixing(axis: Axis) -> Callable[[Experts, Tensor, ExpertOrder], Tensor]:
    def mix(experts: Experts, tokens: Tensor, order: ExpertOrder) -> Tensor:
        return run_at_experts(experts, spread_tokens(tokens, order), order.counts, axis)

    return mix


def _summing(axis: Axis) -> Callable[[Tensor], Tensor]:
    def sum_over_row(tensor: Tensor) -> Tensor:
        whole = tensor.contiguous()
        dist.all_reduce(whole, group=axis.group)
        return whole

    return sum_over_row


def _stream_of(model: nn.Module) -> Any:
    """The residual stream that `apply_tensor` made."""
    stream = getattr(model, "stream", None)
    if stream is None:
        raise ConfigError("a tensor axis is given, but the model is not divided over one: apply_tensor comes first")
    return stream


class _DividedExperts(Experts):
    """Some of the experts of a layer, or a part of the width of each."""

    gradients: dict[str, tuple[Placement, ...]]

    def forward(self, copies: Tensor, counts: Tensor) -> Tensor:
        local = (self._local(name) for name in _WIDTH)
        return apply_experts(copies, counts, *local)

    def _local(self, name: str) -> Tensor:
        parameter: Any = self._parameters[name]
        return parameter.to_local(grad_placements=self.gradients[name]) if isinstance(parameter, DTensor) else parameter


def _divide(experts: Experts, expert: Axis, tensor: Axis) -> None:
    mesh = _joint_mesh(expert, tensor)
    experts.__class__ = _DividedExperts
    assert isinstance(experts, _DividedExperts)
    experts.gradients = {}
    for name, width in _WIDTH.items():
        parameter = experts._parameters[name]
        assert parameter is not None
        values = parameter.detach()
        if isinstance(values, DTensor):  # apply_tensor holds whole what it does not know
            values = values.to_local()
        shape, stride = values.shape, values.stride()
        placements: list[Placement] = []
        for axis, dim in ((expert, 0), (tensor, width)):
            if axis.size > 1:
                size = values.shape[dim] // axis.size
                values = values.narrow(dim, axis.rank * size, size)
                placements.append(Shard(dim))
        values = values.clone(memory_format=torch.contiguous_format)
        divided = DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)
        experts._parameters[name] = nn.Parameter(divided, requires_grad=parameter.requires_grad)
        experts.gradients[name] = tuple(placements)


def _joint_mesh(expert: Axis, tensor: Axis) -> DeviceMesh:
    meshes = [axis.mesh for axis in (expert, tensor) if axis.size > 1]
    if any(mesh is None for mesh in meshes):
        raise ConfigError("an axis of several ranks has no mesh to divide parameters on")
    first = meshes[0]
    assert first is not None
    if len(meshes) == 1:
        return first
    return first._get_root_mesh()[(expert.name, tensor.name)]
