"""Starting and ending torch.distributed from the environment that a launcher left behind."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from trainwright.base.errors import ConfigError
from trainwright.base.processes import ProcessEnvironment, process_environment
from trainwright.comm.ranks import Ranks

__all__ = ["current_ranks", "start", "stop"]

BACKLOG = 4096
"""All ranks of a large run may knock at once."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def start(*, backend: str = "auto", timeout: timedelta = timedelta(minutes=30), device: str | None = None) -> Ranks:
    """Join the other processes of this run, if the environment says that there are any.

    Where torch.distributed runs already (somebody else started it) it is used as it is. A process that no launcher
    started is a world of one, without torch.distributed.

    Args:
        backend: "gloo", "nccl", or "auto": nccl for CUDA devices, gloo otherwise.
        timeout: how long a collective may take.
        device: "cpu" or "cuda"; None takes CUDA where it is.

    Raises:
        ConfigError: the environment contradicts itself, there are more local ranks than devices, or the port is taken.
    """
    environment = process_environment()
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = _device(kind, environment)
    if environment.world == 1 and not dist.is_initialized():
        return Ranks(0, 1, 0, 1, place, timeout=timeout)
    if not dist.is_initialized():
        _initialise(environment, _backend(backend, kind), timeout, place)
    return current_ranks(place, environment, timeout)


def current_ranks(device: torch.device, environment: ProcessEnvironment, timeout: timedelta) -> Ranks:
    """The ranks of the torch.distributed that runs; makes a gloo group for host tensors where the main one is not."""
    group = dist.group.WORLD
    assert group is not None
    world = dist.get_world_size()
    if world == 1:
        return Ranks(0, 1, 0, 1, device, timeout=timeout)
    host_group = group
    if "gloo" not in dist.get_backend(group):
        host_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="trainwright-host")
    return Ranks(
        rank=dist.get_rank(),
        world=world,
        local_rank=environment.local_rank,
        local_world=environment.local_world,
        device=device,
        group=group,
        host_group=host_group,
        timeout=timeout,
    )


def stop() -> None:
    """Leave torch.distributed; does nothing where it does not run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(kind: str, environment: ProcessEnvironment) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if environment.local_rank >= count:
        raise ConfigError(
            f"local rank {environment.local_rank} has no device: this host has {count}",
            hint=f"start at most {count} processes on this host (launch.processes={count})",
        )
    torch.cuda.set_device(environment.local_rank)
    return torch.device("cuda", environment.local_rank)


def _backend(backend: str, kind: str) -> str:
    if backend == "auto":
        return "nccl" if kind == "cuda" else "gloo"
    if backend == "nccl" and kind != "cuda":
        raise ConfigError("comm.backend is nccl, but there is no CUDA device", hint="use comm.backend=gloo, or auto")
    return backend


def _initialise(environment: ProcessEnvironment, backend: str, timeout: timedelta, device: torch.device) -> None:
    if environment.master_addr in _LOOPBACK and os.path.exists("/sys/class/net/lo"):
        # gloo otherwise takes the address that the host's name resolves to, which others can reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device_id = device if backend == "nccl" else None
    if environment.launcher == "torchrun":
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)  # over the store of its agent
        return
    dist.init_process_group(
        backend,
        store=_store(environment, timeout),
        rank=environment.rank,
        world_size=environment.world,
        timeout=timeout,
        device_id=device_id,
    )


def _store(environment: ProcessEnvironment, timeout: timedelta) -> dist.Store:
    """The meeting point; rank 0 serves it, on the address of the run only (a TCPStore by itself listens everywhere)."""
    address, port = environment.master_addr, environment.master_port
    if port is None:
        raise ConfigError(
            "MASTER_PORT is not set, so the ranks cannot find each other",
            hint="set it to a free port of the first host, or start with `trainwright launch`",
        )
    first = environment.rank == 0
    descriptor = _listen(address, port) if first else None
    return dist.TCPStore(
        address,
        port,
        world_size=environment.world,
        is_master=first,
        timeout=min(timeout, timedelta(minutes=5)),
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


def _listen(address: str, port: int) -> int:
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the ranks cannot meet at {address}:{port}: {error.strerror}",
            hint="another program uses that port, or the address is not this host's; set MASTER_PORT and MASTER_ADDR",
        ) from error
    return listener.detach()
