"""What a local world needs before its ranks start: how many, where they meet, what each finds in its environment."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from trainwright.base.device import cpu_cores
from trainwright.base.errors import ConfigError
from trainwright.base.processes import LAUNCH_VARIABLE, ProcessEnvironment, process_environment
from trainwright.launch.heartbeat import FOLDER_VARIABLE, HANG_VARIABLE, enable_flight_recorder

__all__ = ["accelerators", "core_lists", "launched", "rank_environment", "reserve_port", "resolve_processes"]


def launched(place: ProcessEnvironment | None = None) -> bool:
    """Somebody launched this world already, so nothing is to be launched inside it.

    A single srun task is no launched world: `srun --gpus 8 --pty bash` is how people get a machine.
    """
    place = place or process_environment()
    return place.world > 1 or place.launcher in ("torchrun", "trainwright", "mpirun")


def resolve_processes(wanted: int | str) -> int:
    """How many processes to start: the number itself, or for "auto" one for each accelerator, and one without any."""
    return max(1, accelerators()) if wanted == "auto" else int(wanted)


def accelerators() -> int:
    """CUDA (or ROCm) devices that torch sees. Asked in a process of its own, and only where there may be several."""
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    if len(devices) < 2 and not Path("/dev/kfd").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") < 1:
        return len(devices)
    question = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.strip().isdecimal():
        raise ConfigError(
            f"the number of accelerators cannot be told: {answer.stderr.strip().splitlines()[-1:] or 'no answer'}",
            hint="set launch.processes to a number",
        )
    return int(answer.stdout)


def reserve_port(wanted: int | None = None) -> tuple[socket.socket, int]:
    """A loopback port that stays ours: the socket is bound, but does not listen, until the launcher closes it.

    The kernel gives a bound port to nobody who asks for any free one, and refuses those who ask for this one without
    SO_REUSEADDR. Rank 0's store does set it, and may listen because this socket does not. No moment is left in which
    the port is free.

    Raises:
        ConfigError: `wanted` is in use.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind(("127.0.0.1", wanted or 0))
    except OSError as error:
        holder.close()
        raise ConfigError(
            f"port {wanted} of 127.0.0.1 cannot be used for the ranks to meet: {error.strerror}",
            hint="leave the port out: a free one is found",
        ) from error
    return holder, holder.getsockname()[1]


def core_lists(processes: int) -> list[str]:
    """Cores for each rank ("0,1"), cut evenly from those this process may use; `-` where there are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return ["-"] * processes
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < processes:
        return ["-"] * processes
    edges = [rank * len(cores) // processes for rank in range(processes + 1)]
    return [",".join(map(str, cores[start:end])) for start, end in itertools.pairwise(edges)]


def rank_environment(
    base: Mapping[str, str], rank: int, processes: int, port: int, folder: Path, hang_after: float | None
) -> dict[str, str]:
    """The environment of one rank: torch's variables for a world on this machine, threads, and our own."""
    env = {name: value for name, value in base.items() if not name.startswith("TORCHELASTIC_")}
    for name in ("GROUP_RANK", "NODE_RANK", HANG_VARIABLE):
        env.pop(name, None)
    env.update(
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    env[LAUNCH_VARIABLE] = folder.name
    env[FOLDER_VARIABLE] = str(folder)
    if hang_after is not None:
        env[HANG_VARIABLE] = str(hang_after)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // processes)))
    env.setdefault("PYTHONUNBUFFERED", "1")  # a killed rank cannot flush
    if Path("/sys/class/net/lo").exists():
        # gloo otherwise listens on the address that the host's name resolves to, if it resolves at all.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    enable_flight_recorder(env)
    return env
