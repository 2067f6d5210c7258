"""Matrix products that begin while their operands still arrive (asynchronous tensor parallelism).

torch's compiler can replace a gather and the products behind it, or a product and the sum behind it, by one operator
that works piece by piece over memory which the devices of a host share ("symmetric memory"; Wang et al., ASPLOS 2023).
It finds both in compiled blocks. The switch and the registration are private names of torch 2.11 to 2.13, used in this
file only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainwright.base.errors import ConfigError
from trainwright.comm.mesh import Axis

__all__ = ["overlap_problems", "overlap_products"]


def overlap_problems(axis: Axis, *, device: torch.device, compiled: bool) -> list[str]:
    """Why the products of a tensor axis cannot overlap with what its ranks send; empty where they can.

    device: of this rank. compiled: whether the blocks are compiled.
    """
    problems = []
    if axis.size == 1:
        problems.append("parallel.tensor is 1: no product is divided")
    if not compiled:
        problems.append("blocks are not compiled (train.compile), and the compiler is what joins products and messages")
    if device.type != "cuda":
        problems.append(f"the device is {device.type}, and only CUDA devices share memory with each other")
    else:
        if not dist.is_nccl_available():
            problems.append("this torch has no NCCL")
        if axis.size > torch.cuda.device_count():
            problems.append(
                f"the axis has {axis.size} ranks and this host {torch.cuda.device_count()} devices: memory is shared"
                " inside a host"
            )
    return problems


def overlap_products(axis: Axis, *, device: torch.device, compiled: bool) -> None:
    """Let blocks that are compiled from now on overlap their products with the messages of `axis`; all ranks call it.

    Raises:
        ConfigError: it cannot be; every reason is named.
    """
    problems = overlap_problems(axis, device=device, compiled=compiled)
    if problems:
        raise ConfigError(
            "asynchronous tensor parallelism is asked for, but " + "; ".join(problems),
            hint="set parallel.async_tensor=auto, which uses it where it can be",
        )
    import torch._inductor.config as compiler
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    assert axis.group is not None
    enable_symm_mem_for_group(axis.group.group_name)
    compiler._micro_pipeline_tp = True
