"""A model divided by FSDP2: when its parameters are gathered, and how its gradients travel.

Private names of FSDP2 are used in this file only, where its public ones do not reach: which parameters of a group got a
gradient (`_fsdp_param_groups`), and gathering in the background on a CPU (`_set_unshard_async_op`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from trainwright.comm.collectives import GradientSums, WireGroup
from trainwright.comm.mesh import Axis, Mesh
from trainwright.comm.traffic import Traffic
from trainwright.parallel.buckets import Buckets
from trainwright.parallel.data_parallel import DataParallel

if TYPE_CHECKING:
    from trainwright.parallel.zero import ZeroOptions

__all__ = ["Sharded", "ShardedModule", "run_as_forward"]


class ShardedModule(NamedTuple):
    """One module that FSDP2 manages, and the axes over which its parameters are sharded and repeated."""

    module: FSDPModule
    shard: Axis
    replica: Axis


class _CountedGather(DefaultAllGather):
    """FSDP2's own all-gather, with its bytes counted."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._traffic.add("all_gather", output_tensor.numel() * output_tensor.element_size(), group.size())
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _WireScatter(ReduceScatter):
    """The reduce-scatter of one FSDP2 module over our own collectives; one object for each module."""

    def __init__(self, module: FSDPModule, sums: GradientSums, shards: WireGroup, replicas: WireGroup) -> None:
        self._sums = sums
        self._shards = shards
        self._replicas = replicas
        self._parameters = [p for p in _own_parameters(module) if p.requires_grad]
        self._next_is_sent = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for FSDP2: first that of whole gradients, which are sent, then that of this rank's sums.

        Gradients are gathered in the type in which they travel: through fp32 they would be written twice as large only
        to be rounded.
        """
        self._next_is_sent = not self._next_is_sent
        return torch.empty(*size, dtype=dtype if self._next_is_sent else self._shards.wire, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        assert input_tensor.dtype == self._shards.wire, "FSDP2 asks for the buffer of whole gradients first"
        if self._replicas.size == 1:
            self._sums.reduce_scatter(output_tensor, input_tensor, self._shards, owner=self)
        else:
            self._sums.reduce_scatter_replicated(output_tensor, input_tensor, self._shards, self._replicas, owner=self)
        # FSDP2 reads the sums right after this call where it casts them into another type, where it adds them to those
        # of an earlier call (a module that is called twice), and where a hook waits. Otherwise they may arrive later.
        if any(p.grad is not None or p.dtype != output_tensor.dtype or _is_awaited(p) for p in self._parameters):
            self._sums.finish()
        return None


class Sharded(DataParallel):
    """Stages 1 to 3. See `apply_zero`, which makes it."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        traffic: Traffic,
        *,
        modules: Sequence[ShardedModule],
        buckets: Sequence[Buckets],
        options: ZeroOptions,
        depth: int,
    ) -> None:
        super().__init__(model, mesh, traffic)
        assert isinstance(model, FSDPModule)
        self._root = model
        self._modules = [sharded.module for sharded in modules]
        self._rest = list(buckets)
        self._sums = GradientSums(depth=depth, traffic=traffic)
        self._used: dict[int, bool] = {}
        self._watched: set[int] = set()
        self._handles: list[Any] = []
        self._held: dict[nn.Parameter, Tensor] = {}
        self._set_collectives(modules, options)
        self._set_prefetch(options.prefetch)
        for module in self._modules:
            module.set_reduce_scatter_unused_params(True)  # ranks that use different parameters must not hang

    def _set_collectives(self, modules: Sequence[ShardedModule], options: ZeroOptions) -> None:
        for module, shard, replica in modules:
            shards = WireGroup(shard.group, options.wire)
            replicas = WireGroup(replica.group, options.wire)
            module.set_custom_all_gather(_CountedGather(self.traffic))
            module.set_custom_reduce_scatter(_WireScatter(module, self._sums, shards, replicas))
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _set_prefetch(self, count: int) -> None:
        if self.ranks.device.type == "cpu":
            # On a GPU FSDP2 overlaps by streams; on a CPU the collectives must run in the background to overlap.
            self._root._set_unshard_async_op(count > 0)
        blocks = [module for module in self._modules if module is not self._root]
        if count < 1 or not blocks:
            return
        self._root.set_modules_to_forward_prefetch(blocks[:count])
        for index, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])

    def begin_backward(self, *, last: bool) -> None:
        local = self.layout.accumulate == "local"
        self._root.set_requires_gradient_sync(last or not local)
        self._root.set_reshard_after_backward(last or self.layout.gather == "micro_batch")
        self._watch()
        for buckets in self._rest:
            buckets.begin_backward(last=last)

    def end_backward(self, *, last: bool) -> None:
        self._sums.finish()
        for buckets in self._rest:
            buckets.end_backward(last=last)
        if self.layout.accumulate == "sharded":
            self._hold(last)
        if last:
            self._drop_unused()

    def _hold(self, last: bool) -> None:
        """Add up parts of gradients here: FSDP2 would add the next ones before they have arrived."""
        for parameter in self._divided():
            if parameter.grad is None:
                continue
            if parameter in self._held:
                self._held[parameter].add_(_local(parameter.grad))
                if not last:
                    parameter.grad = None
            elif not last:
                self._held[parameter] = _local(parameter.grad)
                parameter.grad = None
        if last:
            for parameter, total in self._held.items():
                if parameter.grad is not None:
                    _local(parameter.grad).copy_(total)
            self._held.clear()

    def _divided(self) -> Iterator[nn.Parameter]:
        """The trained parameters as they are divided, also while the model holds whole ones in their place."""
        for fsdp_param in self._fsdp_params():
            if fsdp_param.sharded_param.requires_grad:
                yield fsdp_param.sharded_param

    def _watch(self) -> None:
        """Note which whole parameters get a gradient; they exist from the first forward pass on."""
        for fsdp_param in self._fsdp_params():
            whole = getattr(fsdp_param, "_unsharded_param", None)
            if whole is not None and whole.requires_grad and id(fsdp_param) not in self._watched:
                self._watched.add(id(fsdp_param))
                self._handles.append(whole.register_post_accumulate_grad_hook(self._noter(id(fsdp_param))))

    def _noter(self, key: int) -> Any:
        used = self._used

        def note(_: Tensor) -> None:
            used[key] = True

        return note

    def _fsdp_params(self) -> Iterator[Any]:
        for module in self._modules:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params

    def _drop_unused(self) -> None:
        """Take the zero gradient away from parameters that no rank used in the whole step, as in a single process."""
        trained = [p for p in self._fsdp_params() if p.sharded_param.requires_grad]
        used = [self._used.get(id(p), False) for p in trained]
        if self.data.any(not all(used)):
            flags = torch.tensor(used, dtype=torch.int32)
            self.data.sum_(flags)
            for fsdp_param, count in zip(trained, flags.tolist(), strict=True):
                if count == 0:
                    fsdp_param.sharded_param.grad = None
        self._used.clear()

    def gradients(self) -> list[Tensor]:
        found = [*super().gradients(), *self._held.values()]
        for fsdp_param in self._fsdp_params():
            whole = getattr(fsdp_param, "unsharded_accumulated_grad", None)
            waiting = (fsdp_param.sharded_param.grad, whole)
            found += [gradient for gradient in waiting if gradient is not None]
        return [_local(gradient) for gradient in found]

    def drop_gathered(self) -> None:
        for module in self._modules:
            module.reshard()

    def close(self) -> None:
        self._sums.finish()
        self.drop_gathered()
        for buckets in self._rest:
            buckets.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def run_as_forward(model: Any, name: str) -> None:
    """Let a method compute with the gathered parameters of the root, as `forward` does.

    torch's `register_fsdp_forward_method` does the same, but gives the parameters up when such a method is called from
    inside `forward`.

    FSDP2 learns of the backward pass by the gradient of what comes out. Where all before the head is frozen that has
    none, and the head's gradient would stay here: then the output asks for one.
    """
    method = getattr(model, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        state = model._get_fsdp_state()
        if state._training_state == TrainingState.FORWARD:
            return method(*args, **kwargs)
        args, kwargs = state._pre_forward(model, args, kwargs)
        output = method(*args, **kwargs)
        if isinstance(output, Tensor) and torch.is_grad_enabled() and output.is_leaf and output.is_floating_point():
            output.requires_grad_()
        return state._post_forward(model, args, output)

    setattr(model, name, call)


def _own_parameters(module: Any) -> Iterator[nn.Parameter]:
    """Parameters that the FSDP2 group of `module` manages."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for fsdp_param in group.fsdp_params:
            yield fsdp_param.sharded_param


def _is_awaited(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
