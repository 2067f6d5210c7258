"""ZeRO as a policy over FSDP2: stages 0 to 3 and hybrid sharding of any module.

Stage 0 replicates. Stages 1 to 3 are one wrapping (`fully_shard` of every block and of the rest) under different rules
of when parameters are gathered and when gradients travel. Parameters and optimizer state are always divided there; what
a stage holds whole beside them is what tells the stages apart:

    stage 1   whole parameters during a step, whole gradients until its last backward pass
    stage 2   whole parameters during a step; gradients divided (or whole while they add up, where memory allows)
    stage 3   whole parameters of one or two blocks at a time; gradients as at stage 2
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trainwright.base.errors import ConfigError
from trainwright.comm.collectives import WireGroup
from trainwright.comm.mesh import Axis, Mesh
from trainwright.comm.traffic import Traffic
from trainwright.parallel.blocks import blocks_of
from trainwright.parallel.buckets import Buckets
from trainwright.parallel.data_parallel import DataParallel, Replicated
from trainwright.parallel.pipeline.split import module_names
from trainwright.parallel.sharded import Sharded, ShardedModule, run_as_forward

__all__ = ["ZeroOptions", "apply_zero"]

FORWARD_METHODS = ("hidden_states", "run_stage")
"""Methods that compute with the parameters of the root, beside `forward`."""


@dataclass(frozen=True)
class ZeroOptions:
    """How a layout is carried out.

    Attributes:
        wire: the type in which gradients travel; they are added in fp32.
        compute: the type in which parameters are gathered; None gathers them as they are held.
        keep_fp32: patterns of module names whose parameters are gathered as they are held.
        prefetch: blocks whose parameters are gathered ahead of their use; 0 gathers each when it is needed.
        overlap: gradient sums under way at once beside the backward pass; 0 waits for each.
        host_parameters: this rank's parts of parameters and gradients live in pinned host memory, and the optimizer
            steps there; on a CPU they do anyway.
    """

    wire: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    keep_fp32: Sequence[str] = ()
    prefetch: int = 1
    overlap: int = 2
    host_parameters: bool = False


def apply_zero(
    model: nn.Module,
    mesh: Mesh,
    options: ZeroOptions | None = None,
    *,
    experts: Sequence[nn.Module] = (),
) -> DataParallel:
    """Divide the state of `model` in place as the mesh's layout says; a collective of all ranks.

    Parameters must be equal on all ranks of the data axis (see `synchronise`), on their device or on the meta device,
    in the type in which they are to be held, and changed no more in their set. Those that are divided already, over
    the tensor or the expert axis, are DTensors of that axis. Names stay as they are; what is divided becomes a DTensor.

    Args:
        experts: modules whose parameters are divided over the expert axis: their gradients are sums over the tokens of
            all its ranks already, and their state is sharded over what is left of the data axis.

    Raises:
        ConfigError: a `keep_fp32` pattern matches no module; trained parameters of one module have several types.
    """
    options = options or ZeroOptions()
    traffic = Traffic()
    depth = options.overlap if mesh.ranks.device.type == "cpu" else 0  # on a GPU streams overlap, without our help
    apart = {p for module in experts for p in module.parameters()} if mesh.expert.size > 1 else set()

    def buckets(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> Buckets:
        return Buckets(parameters, WireGroup(group, options.wire), depth=depth, traffic=traffic)

    own = [p for p in model.parameters() if p in apart]
    if not mesh.layout.is_sharded:
        common = [p for p in model.parameters() if p not in apart]
        both = [buckets(common, mesh.data.group), buckets(own, mesh.expert_replica.group)]
        return Replicated(model, mesh, traffic, buckets=both)
    scalars = {p for p in model.parameters() if p.dim() == 0}  # which FSDP2 cannot divide
    # Experts of which every rank of a copy holds its own are not divided any further.
    whole = {*own} if mesh.expert_shard.size == 1 else set()
    wrap = _Wrap(model, mesh, options, scalars | whole)
    modules = wrap.all(list(experts) if apart and not whole else [])
    rest = [buckets([p for p in model.parameters() if p in scalars and p not in whole], mesh.data.group)]
    if whole:
        rest.append(buckets(own, mesh.expert_replica.group))
    return Sharded(model, mesh, traffic, modules=modules, buckets=rest, options=options, depth=depth)


class _Wrap:
    """`fully_shard` of a model's modules, from the inside out."""

    def __init__(self, model: nn.Module, mesh: Mesh, options: ZeroOptions, ignored: set[nn.Parameter]) -> None:
        self.model = model
        self.mesh = mesh
        self.options = options
        self.ignored = ignored
        self.frees = mesh.layout.gather == "micro_batch"
        on_device = mesh.ranks.device.type == "cpu" or not options.host_parameters
        self.offload = OffloadPolicy() if on_device else CPUOffloadPolicy()
        self.done: list[ShardedModule] = []

    def all(self, experts: Sequence[nn.Module]) -> list[ShardedModule]:
        """Wrap everything; returns the wrapped modules, blocks first, in order of definition."""
        model, policy, frees = self.model, _policy(self.options.compute), self.frees
        blocks = [block for _, block in blocks_of(model)]
        kept = _modules_kept(model, self.options)
        for module in kept:
            self.shard(module, _policy(None), frees)
        for module in experts:
            self.shard(module, policy, frees, self.mesh.expert_shard, self.mesh.expert_replica)
        for block in blocks:
            for part in _by_type(block, [*kept, *experts]):
                self.shard(part, policy, frees)
            self.shard(block, policy, frees)
        for part in _by_type(model, [*kept, *blocks]):
            if part not in blocks:
                self.shard(part, policy, frees)
        self.shard(model, policy, False)
        for method in FORWARD_METHODS:
            if callable(getattr(model, method, None)):
                run_as_forward(model, method)
        return self.done

    def shard(
        self,
        module: nn.Module,
        mixed: MixedPrecisionPolicy,
        reshard: bool,
        shard: Axis | None = None,
        replica: Axis | None = None,
    ) -> None:
        axis = shard or self.mesh.shard
        fully_shard(
            module,
            mesh=axis.mesh,
            mp_policy=mixed,
            reshard_after_forward=reshard,
            ignored_params=self.ignored,
            offload_policy=self.offload,
            # Only experts: few of them are left on a rank, and rows that do not divide would leave ranks without any.
            shard_placement_fn=None if shard is None else partial(_dimension_to_cut, ranks=shard.size),
        )
        assert isinstance(module, FSDPModule)
        self.done.append(ShardedModule(module, axis, replica or self.mesh.replica))


def _dimension_to_cut(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Along which dimension a parameter is divided: rows if they divide, else another that does and is whole so far."""
    local: Tensor = parameter
    taken: set[int] = set()
    if isinstance(parameter, DTensor):
        taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
        local = parameter.to_local()
    if local.shape[0] % ranks == 0:
        return None
    free = [dim for dim in range(1, local.dim()) if dim not in taken and local.shape[dim] % ranks == 0]
    return Shard(free[0]) if free else None


def _policy(compute: torch.dtype | None) -> MixedPrecisionPolicy:
    # Inputs are not cast: rotary tables and residual streams stay fp32, and autocast casts what multiplies matrices.
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _modules_kept(model: nn.Module, options: ZeroOptions) -> list[nn.Module]:
    """Modules that `keep_fp32` names, with parameters of their own or below; the outermost of nested ones."""
    kept: list[nn.Module] = []
    inside: set[int] = set()
    known = module_names(model)
    for pattern in options.keep_fp32:
        names = [name for name, module in model.named_modules() if name and re.search(pattern, name)]
        if not any(re.search(pattern, name) for name in known):
            raise ConfigError(
                f"keep_fp32 pattern {pattern!r} matches no module",
                hint=f"modules are called {', '.join(known[:5])}, ...",
            )
        for name in names:
            module = model.get_submodule(name)
            if id(module) not in inside and any(True for _ in module.parameters()):
                kept.append(module)
                inside.update(id(inner) for inner in module.modules())
    return kept


def _by_type(module: nn.Module, apart: Sequence[nn.Module]) -> list[nn.Module]:
    """Submodules to wrap on their own so that the trained parameters left in `module` all have one type.

    Raises:
        ConfigError: one module holds trained parameters of several types itself.
    """
    outside = {id(inner) for other in apart if other is not module for inner in other.modules()}
    own: dict[nn.Module, set[torch.dtype]] = {}
    for inner in module.modules():
        types = {p.dtype for p in inner._parameters.values() if p is not None and p.requires_grad}
        if types and id(inner) not in outside:
            own[inner] = types
    counts: dict[torch.dtype, int] = {}
    for inner, types in own.items():
        if len(types) > 1:
            raise ConfigError(
                f"{type(inner).__name__} holds trained parameters of several types: {', '.join(map(str, types))}",
                hint="hold them in one type (precision decides it), or put them into modules of their own",
            )
        kind = next(iter(types))
        counts[kind] = counts.get(kind, 0) + sum(p.numel() for p in inner._parameters.values() if p is not None)
    if len(counts) < 2:
        return []
    main = max(counts, key=lambda kind: counts[kind])
    return [inner for inner, types in own.items() if next(iter(types)) != main and inner is not module]
