"""From the meta device to real weights, one parameter at a time: no rank ever holds more than its part and one whole.

A model is built on the meta device, divided there (parameters become meta DTensors, a pipeline keeps its blocks), and
given storage and values here. The value of a parameter is a function of its name, so that every layout starts from the
same weights, bit by bit; of the whole value each rank keeps the boxes that its part is made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.base.errors import ModelError
from trainwright.comm.boxes import local_boxes, narrow
from trainwright.models.weights import kept_tensors
from trainwright.parallel.pipeline import alias_parameters

__all__ = ["Values", "materialise"]

Values = Callable[[str, Sequence[int], torch.dtype], Tensor]
"""(name, shape, dtype) of a parameter or kept buffer -> its whole value, on any device and in any floating type."""


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device | str, values: Values) -> nn.Module:
    """Give everything of `model` that is on the meta device storage on `device` and its value; returns the model.

    Parameters stay the objects that they are, with their hooks and ties, whatever has divided them. What is not on the
    meta device is left alone. A parameter that is a copy of a tied one on another stage of a pipeline gets the value
    of that name.

    Args:
        values: called once for every parameter and kept buffer, one after the other.

    Raises:
        ModelError: a value has another shape, or a buffer that is in no checkpoint is on the meta device: what it holds
            is known only to the code that made it.
    """
    waiting = [name for name, tensor in kept_tensors(model).items() if tensor.is_meta]
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in waiting]
    if lost:
        raise ModelError(
            f"buffers on the meta device that no checkpoint holds: {', '.join(lost[:6])}",
            hint="build the model on a real device, or compute them in its forward pass",
        )
    with _same_parameters(model):
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tensors = kept_tensors(model)
    aliases = alias_parameters(model)
    for name in waiting:
        _fill(aliases.get(name, name), tensors[name], values)
    return model


@contextlib.contextmanager
def _same_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, `_apply` changes what parameters hold, not which objects they are: ZeRO has noted them already.

    Hooks that wait for gradients do not move with the contents; setting the same hooks anew attaches them again.
    """
    hooks = {p: found for p in model.parameters() if (found := p._post_accumulate_grad_hooks)}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for parameter, found in hooks.items():
        parameter._post_accumulate_grad_hooks = found


def _fill(name: str, tensor: Tensor, values: Values) -> None:
    """Copy this rank's part of the value of `name` into `tensor`. On return the whole value is let go."""
    whole = values(name, tuple(tensor.shape), tensor.dtype)
    if whole.shape != tensor.shape:
        raise ModelError(f"the value of {name} is {list(whole.shape)}, expected {list(tensor.shape)}")
    if not isinstance(tensor, DTensor):
        tensor.copy_(whole)
        return
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "only ranks of a parameter's mesh hold it"
    shape, boxes = local_boxes(tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate, tensor.placements)
    part = tensor.to_local()
    assert tuple(part.shape) == shape, f"a part is {list(part.shape)}, its boxes make {list(shape)}"
    for box in boxes:
        narrow(part, box.at, box.shape).copy_(narrow(whole, box.offset, box.shape))
