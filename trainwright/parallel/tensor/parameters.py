"""Parameters of a tensor axis: DTensors made of equal values without a message."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainwright.comm.mesh import Axis

__all__ = ["Divider", "local", "part_of"]


def part_of(size: int, axis: Axis) -> tuple[int, int]:
    """(first, count) of this rank's part of `size` things: ceil(size / ranks) each, the last ranks less or none."""
    each = -(-size // axis.size)
    first = min(size, axis.rank * each)
    return first, min(size, first + each) - first


def local(parameter: Tensor, gradient: Placement) -> Tensor:
    """This rank's values of a parameter as a plain tensor; what its gradient then is: a part, or an addend."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[gradient])
    return parameter


class Divider:
    """Replaces parameters of modules by DTensors; a parameter that several modules share stays one parameter.

    All ranks must hold equal values (or the meta device none). The rest of a divided parameter is let go.
    """

    def __init__(self, axis: Axis) -> None:
        assert axis.mesh is not None
        self.axis = axis
        self._mesh = axis.mesh
        self._made: dict[int, nn.Parameter] = {}
        self._kept: list[nn.Parameter] = []  # so that no id in `_made` is given to another

    def shard(self, module: nn.Module, name: str, dim: int) -> None:
        """Keep this rank's part of `module.name` along `dim`."""
        self._replace(module, name, dim)

    def replicate(self, module: nn.Module, name: str) -> None:
        """Keep all of `module.name`."""
        self._replace(module, name, None)

    def is_made(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is a result of this divider."""
        return isinstance(parameter, DTensor)

    def _replace(self, module: nn.Module, name: str, dim: int | None) -> None:
        parameter = module._parameters.get(name)
        if parameter is None or isinstance(parameter, DTensor):
            return
        if id(parameter) not in self._made:
            self._made[id(parameter)] = self._make(parameter, dim)
            self._kept.append(parameter)
        module._parameters[name] = self._made[id(parameter)]

    def _make(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        values = parameter.detach()
        placement: Placement = Replicate()
        if dim is not None:
            placement = Shard(dim)
            first, count = part_of(values.shape[dim], self.axis)
            values = values.narrow(dim, first, count).clone(memory_format=torch.contiguous_format)
        divided = DTensor.from_local(
            values, self._mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return nn.Parameter(divided, requires_grad=parameter.requires_grad)
