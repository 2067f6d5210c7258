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

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from trainwright.base.errors import ConfigError
from trainwright.comm.collectives import WireGroup
from trainwright.comm.mesh import DataMesh, Layout, make_data_mesh
from trainwright.comm.ranks import Ranks
from trainwright.comm.traffic import Traffic
from trainwright.parallel.blocks import find_blocks
from trainwright.parallel.data_parallel import DataParallel, Replicated
from trainwright.parallel.sharded import Sharded, run_as_forward

__all__ = ["ZeroOptions", "apply_zero"]

FORWARD_METHODS = ("hidden_states",)
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


def apply_zero(model: nn.Module, layout: Layout, ranks: Ranks, options: ZeroOptions | None = None) -> DataParallel:
    """Divide `model` in place as the layout says; a collective of all ranks.

    Parameters must be equal on all ranks (see `synchronise`), on their device, in the type in which they are to be
    held, and changed no more in their set. Names stay as they are; divided parameters become DTensors.

    Raises:
        ConfigError: a `keep_fp32` pattern matches no module; trained parameters of one module have several types.
    """
    options = options or ZeroOptions()
    traffic = Traffic()
    mesh = make_data_mesh(layout, ranks)
    depth = options.overlap if ranks.device.type == "cpu" else 0  # on a GPU streams overlap, without our help
    if mesh.shard is None:
        among = WireGroup(mesh.all_group, options.wire)
        parameters = list(model.parameters())
        return Replicated(model, layout, ranks, traffic, parameters=parameters, among=among, depth=depth)
    scalars = {p for p in model.parameters() if p.dim() == 0}  # which FSDP2 cannot divide
    groups = _wrap(model, layout, mesh, options, scalars)
    rest = Replicated(
        model,
        layout,
        ranks,
        traffic,
        parameters=[p for p in model.parameters() if p in scalars],
        among=WireGroup(mesh.all_group, options.wire),
        depth=depth,
    )
    return Sharded(model, layout, ranks, traffic, modules=groups, mesh=mesh, rest=rest, options=options, depth=depth)


def _wrap(
    model: nn.Module, layout: Layout, mesh: DataMesh, options: ZeroOptions, scalars: set[nn.Parameter]
) -> list[FSDPModule]:
    """`fully_shard` from the inside out; returns the wrapped modules, blocks first, in order of definition."""
    policy = _policy(options.compute)
    plain = _policy(None)
    frees = layout.gather == "micro_batch"
    blocks = find_blocks(model)
    kept = _modules_kept(model, options)
    groups: list[nn.Module] = []
    on_device = mesh.shard is None or mesh.shard.device_type == "cpu" or not options.host_parameters
    offload = OffloadPolicy() if on_device else CPUOffloadPolicy()

    def shard(module: nn.Module, mixed: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(
            module,
            mesh=mesh.shard,
            mp_policy=mixed,
            reshard_after_forward=reshard,
            ignored_params=scalars,
            offload_policy=offload,
        )
        groups.append(module)

    for module in kept:
        shard(module, plain, frees)
    for _, block in blocks:
        for part in _by_type(block, kept):
            shard(part, policy, frees)
        shard(block, policy, frees)
    stacks = {id(block) for _, block in blocks}
    for part in _by_type(model, [*kept, *(b for _, b in blocks)]):
        if id(part) not in stacks:
            shard(part, policy, frees)
    shard(model, policy, False)
    assert isinstance(model, FSDPModule)
    for method in FORWARD_METHODS:
        if callable(getattr(model, method, None)):
            run_as_forward(model, method)
    return [module for module in groups if isinstance(module, FSDPModule)]


def _policy(compute: torch.dtype | None) -> MixedPrecisionPolicy:
    # Inputs are not cast: rotary tables and residual streams stay fp32, and autocast casts what multiplies matrices.
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _modules_kept(model: nn.Module, options: ZeroOptions) -> list[nn.Module]:
    """Modules that `keep_fp32` names, with parameters of their own or below; the outermost of nested ones."""
    kept: list[nn.Module] = []
    inside: set[int] = set()
    for pattern in options.keep_fp32:
        names = [name for name, module in model.named_modules() if name and re.search(pattern, name)]
        if not names:
            raise ConfigError(
                f"keep_fp32 pattern {pattern!r} matches no module",
                hint=f"modules are called {', '.join(name for name, _ in list(model.named_modules())[1:6])}, ...",
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
